"""preflights say how far they are, and what a sample of the rows says before all are read; expand only"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0040_preflight_progress"
down_revision = "0039_job_traces"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("preflights", sa.Column("progress", postgresql.JSONB(none_as_null=True), nullable=True))
    op.add_column("preflights", sa.Column("sample", postgresql.JSONB(none_as_null=True), nullable=True))


def downgrade() -> None:
    op.drop_column("preflights", "sample")
    op.drop_column("preflights", "progress")
