"""jobs remember the span of the request that made them; expand only"""

import sqlalchemy as sa
from alembic import op

revision = "0039_job_traces"
down_revision = "0038_queue_depth"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("traceparent", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "traceparent")
