"""jobs know for which device their values were settled, and how many packed tokens fit a pass; expand only"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0037_settled_for"
down_revision = "0036_exports"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("settled_for", postgresql.JSONB(), nullable=True))
    op.add_column("jobs", sa.Column("pass_tokens", sa.Integer(), nullable=True))
    # The plan added a tenth to what a job asks for; now the job asks for it. A version before this one that still runs
    # adds its tenth on top for as long: it waits for a little more memory than it needs.
    op.execute(
        "update jobs set bytes_per_device = ceil(bytes_per_device * 1.1)"
        " where status in ('queued', 'running', 'paused')"
    )


def downgrade() -> None:
    op.execute(
        "update jobs set bytes_per_device = floor(bytes_per_device / 1.1)"
        " where status in ('queued', 'running', 'paused')"
    )
    op.drop_column("jobs", "pass_tokens")
    op.drop_column("jobs", "settled_for")
