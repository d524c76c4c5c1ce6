"""workers say what their host keeps programs from; projects have limits of files and bytes of their own; expand only"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0014_walls"
down_revision = "0013_device_abilities"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("workers", sa.Column("isolation", postgresql.JSONB(), nullable=True))
    op.add_column("projects", sa.Column("max_bytes", sa.BigInteger(), nullable=True))
    op.add_column("projects", sa.Column("max_files", sa.Integer(), nullable=True))


def downgrade() -> None:
    op.drop_column("projects", "max_files")
    op.drop_column("projects", "max_bytes")
    op.drop_column("workers", "isolation")
