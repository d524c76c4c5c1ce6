"""sweeps remember the span of the request that made them, for their trials' jobs; expand only"""

import sqlalchemy as sa
from alembic import op

revision = "0042_sweep_traces"
down_revision = "0041_delivery_counts"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("sweeps", sa.Column("traceparent", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("sweeps", "traceparent")
