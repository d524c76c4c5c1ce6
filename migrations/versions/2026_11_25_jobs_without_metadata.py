"""jobs without metadata are found by an index: the list's filter `metadata=null` read the whole table"""

import sqlalchemy as sa
from alembic import op

revision = "0005_without_metadata"
down_revision = "0004_merges"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Concurrently, so that submissions go on while a long table is indexed.
    with op.get_context().autocommit_block():
        # What an interrupted attempt left is invalid, and stays so: no query uses it.
        op.drop_index("ix_jobs_without_metadata", "jobs", postgresql_concurrently=True, if_exists=True)
        op.create_index(
            "ix_jobs_without_metadata",
            "jobs",
            ["project_id", "id"],
            postgresql_where=sa.text("metadata is null"),
            postgresql_concurrently=True,
        )


def downgrade() -> None:
    with op.get_context().autocommit_block():
        op.drop_index("ix_jobs_without_metadata", "jobs", postgresql_concurrently=True, if_exists=True)
