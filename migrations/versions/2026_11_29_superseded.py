"""jobs say which newer job took their place

Expand only: the version before never reads or writes the column.
"""

import sqlalchemy as sa
from alembic import op

revision = "0010_superseded"
down_revision = "0009_base_models"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("superseded_by", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "superseded_by")
