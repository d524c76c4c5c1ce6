"""whether a file is no JSONL by its first bytes, so that a program makes rows of it

Expand only: the version before goes by the file's name.
"""

import sqlalchemy as sa
from alembic import op

revision = "0015_packed_files"
down_revision = "0014_walls"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("files", sa.Column("packed", sa.Boolean(), nullable=True))


def downgrade() -> None:
    op.drop_column("files", "packed")
