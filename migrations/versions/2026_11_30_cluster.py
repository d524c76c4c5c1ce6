"""attempts that a cluster runs say what it calls them and what it says of them; expand only"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0032_cluster"
down_revision = "0031_logs"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("attempts", sa.Column("cluster", postgresql.JSONB(), nullable=True))


def downgrade() -> None:
    op.drop_column("attempts", "cluster")
