"""webhooks count the tries of their deliveries, which are forgotten after a month; expand only"""

import sqlalchemy as sa
from alembic import op

revision = "0041_delivery_counts"
down_revision = "0040_preflight_progress"
branch_labels = None
depends_on = None

COUNTS = ("delivered", "failed", "given_up")


def upgrade() -> None:
    for name in COUNTS:
        op.add_column("webhooks", sa.Column(f"{name}_count", sa.BigInteger(), server_default="0", nullable=False))


def downgrade() -> None:
    for name in reversed(COUNTS):
        op.drop_column("webhooks", f"{name}_count")
