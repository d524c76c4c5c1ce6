"""attempts have the trainer's log: where it lies in the store, and its lines until it does; expand only"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0031_logs"
down_revision = "0030_signing"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("attempts", sa.Column("log", postgresql.JSONB(none_as_null=True), nullable=True))
    op.create_table(
        "log_pieces",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("start", sa.BigInteger(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_log_pieces_job_id_jobs")),
        sa.PrimaryKeyConstraint("job_id", "fence", "start", name=op.f("pk_log_pieces")),
    )


def downgrade() -> None:
    op.drop_table("log_pieces")
    op.drop_column("attempts", "log")
