"""aliases: movable names of tuned models, and their versions

Expand only: the version before knows no such tables.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0018_aliases"
down_revision = "0017_evaluations"
branch_labels = None
depends_on = None


def _json() -> postgresql.JSONB:
    return postgresql.JSONB(none_as_null=True, astext_type=sa.Text())


def upgrade() -> None:
    op.create_table(
        "aliases",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("model_id", sa.Text(), nullable=True),
        sa.Column("fallback_id", sa.Text(), nullable=True),
        sa.Column("movers", _json(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("moved_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("(version = 0) = (model_id is null)", name=op.f("ck_aliases_version_has_model")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_aliases_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_aliases")),
    )
    op.create_index(
        "uq_aliases_project_id_name",
        "aliases",
        ["project_id", "name"],
        unique=True,
        postgresql_where=sa.text("deleted_at is null"),
    )
    op.create_table(
        "alias_versions",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("alias_id", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("model_id", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=True),
        sa.Column("restores", sa.Integer(), nullable=True),
        sa.Column("gate", _json(), nullable=True),
        sa.Column("forced", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("kind in ('promote','rollback')", name=op.f("ck_alias_versions_kind")),
        sa.CheckConstraint(
            "(kind = 'rollback') = (restores is not null)", name=op.f("ck_alias_versions_rollback_restores")
        ),
        sa.ForeignKeyConstraint(["alias_id"], ["aliases.id"], name=op.f("fk_alias_versions_alias_id_aliases")),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name=op.f("fk_alias_versions_key_id_api_keys")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alias_versions")),
        sa.UniqueConstraint("alias_id", "number", name=op.f("uq_alias_versions_alias_id_number")),
    )


def downgrade() -> None:
    op.drop_table("alias_versions")
    op.drop_table("aliases")
