"""attempts say from which step and token to which they went, devices what their GPU reads; expand only"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0025_metrics"
down_revision = "0024_descriptions"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("attempts", sa.Column("first_tokens", sa.BigInteger(), nullable=True))
    op.add_column("attempts", sa.Column("last_tokens", sa.BigInteger(), nullable=True))
    op.add_column("devices", sa.Column("readings", postgresql.JSONB(), nullable=True))


def downgrade() -> None:
    op.drop_column("devices", "readings")
    op.drop_column("attempts", "last_tokens")
    op.drop_column("attempts", "first_tokens")
