"""jobs that train together on one base share a device; expand only"""

import sqlalchemy as sa
from alembic import op

revision = "0044_cotraining"
down_revision = "0043_warm_base"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("cotraining_ground", sa.Text(), nullable=True))
    op.add_column("jobs", sa.Column("base_bytes", sa.BigInteger(), nullable=True))
    op.add_column("attempts", sa.Column("together", sa.Integer(), nullable=True))
    op.add_column("attempts", sa.Column("device_share", sa.Double(), nullable=True))


def downgrade() -> None:
    op.drop_column("attempts", "device_share")
    op.drop_column("attempts", "together")
    op.drop_column("jobs", "base_bytes")
    op.drop_column("jobs", "cotraining_ground")
