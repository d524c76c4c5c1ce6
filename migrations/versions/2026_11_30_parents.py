"""jobs say which tuned model they go on from; expand only"""

import sqlalchemy as sa
from alembic import op

revision = "0026_parents"
down_revision = "0025_metrics"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # The columns are committed before the index is begun: what was interrupted in between is done once more.
    op.add_column("jobs", sa.Column("parent_id", sa.Text(), nullable=True), if_not_exists=True)
    op.add_column("jobs", sa.Column("parent_name", sa.Text(), nullable=True), if_not_exists=True)
    # Concurrently, so that submissions go on while a long table is indexed.
    with op.get_context().autocommit_block():
        # What an interrupted attempt left is invalid, and stays so: no query uses it.
        op.drop_index("ix_jobs_parent_id", "jobs", postgresql_concurrently=True, if_exists=True)
        op.create_index(
            "ix_jobs_parent_id",
            "jobs",
            ["parent_id"],
            postgresql_where=sa.text("parent_id is not null"),
            postgresql_concurrently=True,
        )


def downgrade() -> None:
    with op.get_context().autocommit_block():
        op.drop_index("ix_jobs_parent_id", "jobs", postgresql_concurrently=True, if_exists=True)
    op.drop_column("jobs", "parent_name", if_exists=True)
    op.drop_column("jobs", "parent_id", if_exists=True)
