"""exports: tuned models as files for other servers, and their way to a hub; expand only"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0036_exports"
down_revision = "0035_worker_libraries"
branch_labels = None
depends_on = None


def _json() -> postgresql.JSONB:
    return postgresql.JSONB(none_as_null=True, astext_type=sa.Text())


def upgrade() -> None:
    op.create_table(
        "exports",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("request", _json(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("spec", _json(), nullable=False),
        sa.Column("fence", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("failures", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("lease_owner", sa.Text(), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("manifest", _json(), nullable=True),
        sa.Column("error", _json(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("kind in ('gguf','gguf_lora','hub')", name=op.f("ck_exports_kind")),
        sa.CheckConstraint("status in ('queued','running','succeeded','failed')", name=op.f("ck_exports_status")),
        sa.CheckConstraint(
            "(status = 'succeeded') = (manifest is not null)", name=op.f("ck_exports_success_has_manifest")
        ),
        sa.CheckConstraint(
            "(status in ('succeeded','failed')) = (finished_at is not null)", name=op.f("ck_exports_end_has_moment")
        ),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_exports_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_exports")),
    )
    op.create_index(
        "ix_exports_project_id_id",
        "exports",
        ["project_id", "id"],
        unique=False,
        postgresql_where=sa.text("deleted_at is null"),
    )
    op.create_index(
        "ix_exports_unfinished",
        "exports",
        ["id"],
        unique=False,
        postgresql_where=sa.text("status in ('queued','running') and deleted_at is null"),
    )


def downgrade() -> None:
    op.drop_table("exports")
