"""keys that sign where adapters come from; expand only"""

import sqlalchemy as sa
from alembic import op

revision = "0030_signing"
down_revision = "0029_evals"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "signing_keys",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("algorithm", sa.Text(), server_default=sa.text("'ed25519'"), nullable=False),
        sa.Column("public_key", sa.Text(), nullable=False),
        sa.Column("sealed", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("retired_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_signing_keys")),
    )
    op.create_index(
        "uq_signing_keys_signs",
        "signing_keys",
        ["algorithm"],
        unique=True,
        postgresql_where=sa.text("retired_at is null"),
    )


def downgrade() -> None:
    op.drop_table("signing_keys")
