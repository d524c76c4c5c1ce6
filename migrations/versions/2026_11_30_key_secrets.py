"""key_secrets and oidc_rules: further secrets of a key, and whose ID tokens are exchanged for such secrets

Expand only: the version before knows no such tables. It refuses a key's former secret, and a secret that was exchanged,
until it is replaced.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0028_key_secrets"
down_revision = "0027_integrations"
branch_labels = None
depends_on = None

MOMENT = sa.DateTime(timezone=True)
NOW = sa.text("now()")


def upgrade() -> None:
    json = postgresql.JSONB(none_as_null=True, astext_type=sa.Text())
    op.add_column("api_keys", sa.Column("rotated_at", MOMENT, nullable=True))
    op.add_column("api_keys", sa.Column("former_until", MOMENT, nullable=True))
    op.create_table(
        "key_secrets",
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("origin", sa.Text(), nullable=True),
        sa.Column("created_at", MOMENT, server_default=NOW, nullable=False),
        sa.Column("expires_at", MOMENT, nullable=False),
        sa.Column("kept_until", MOMENT, nullable=False),
        sa.Column("last_used_at", MOMENT, nullable=True),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name=op.f("fk_key_secrets_key_id_api_keys")),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_key_secrets")),
        sa.UniqueConstraint("origin", name=op.f("uq_key_secrets_origin")),
    )
    op.create_index(op.f("ix_key_secrets_key_id"), "key_secrets", ["key_id"])
    op.create_index(op.f("ix_key_secrets_kept_until"), "key_secrets", ["kept_until"])
    op.create_table(
        "oidc_rules",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("issuer", sa.Text(), nullable=False),
        sa.Column("audience", sa.Text(), nullable=False),
        sa.Column("claims", json, nullable=False),
        sa.Column("life_seconds", sa.Integer(), nullable=False),
        sa.Column("created_at", MOMENT, server_default=NOW, nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_oidc_rules_project_id_projects")),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name=op.f("fk_oidc_rules_key_id_api_keys")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_oidc_rules")),
        sa.UniqueConstraint("key_id", name=op.f("uq_oidc_rules_key_id")),
    )
    op.create_index(op.f("ix_oidc_rules_issuer"), "oidc_rules", ["issuer"])


def downgrade() -> None:
    op.drop_table("oidc_rules")
    op.drop_table("key_secrets")
    op.drop_column("api_keys", "former_until")
    op.drop_column("api_keys", "rotated_at")
