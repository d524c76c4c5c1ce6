"""devices say which base model waits in memory for their next job; expand only"""

import sqlalchemy as sa
from alembic import op

revision = "0043_warm_base"
down_revision = "0042_sweep_traces"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("devices", sa.Column("warm_base", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("devices", "warm_base")
