"""base models that are added by a route, and what the headers of a model's weights say

Expand only: the version before knows neither the table nor the column.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0011_models"
down_revision = "0010_superseded"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "added_models",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("locator", sa.Text(), nullable=False),
        sa.Column("revision", sa.Text(), nullable=False),
        sa.Column("aliases", postgresql.JSONB(), server_default=sa.text("'[]'::jsonb"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("source in ('hub','path')", name=op.f("ck_added_models_source")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_added_models")),
    )
    op.add_column("base_models", sa.Column("weights", postgresql.JSONB(), nullable=True))


def downgrade() -> None:
    op.drop_column("base_models", "weights")
    op.drop_table("added_models")
