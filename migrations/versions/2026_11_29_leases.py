"""one lease: file checks and preflights get the columns that jobs and merges have

Expand only. `files.check_attempts` and `preflights.checker` go on as the fence, `check_until` as the end of the lease,
so that workers of this version and of the one before see each other's leases.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008_leases"
down_revision = "0007_unfinished_jobs"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("files", "preflights"):
        op.add_column(table, sa.Column("failures", sa.Integer(), server_default=sa.text("0"), nullable=False))
        op.add_column(table, sa.Column("lease_owner", sa.Text(), nullable=True))


def downgrade() -> None:
    for table in ("preflights", "files"):
        op.drop_column(table, "lease_owner")
        op.drop_column(table, "failures")
