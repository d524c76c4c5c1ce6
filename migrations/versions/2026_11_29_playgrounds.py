"""playgrounds: where models of a pool can be asked, and what each of them has in memory

Expand only: the version before knows no such table.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0016_playgrounds"
down_revision = "0015_packed_files"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "playgrounds",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pool", sa.Text(), nullable=False),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("port", sa.Integer(), nullable=False),
        sa.Column("token", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=True),
        sa.Column(
            "adapters",
            postgresql.JSONB(none_as_null=True, astext_type=sa.Text()),
            server_default=sa.text("'[]'::jsonb"),
            nullable=False,
        ),
        sa.Column("asked", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("last_seen", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("state in ('cold','warming','warm','yielding')", name=op.f("ck_playgrounds_state")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_playgrounds")),
    )


def downgrade() -> None:
    op.drop_table("playgrounds")
