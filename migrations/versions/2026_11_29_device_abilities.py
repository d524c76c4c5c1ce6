"""what a device can compute and what its probe found; what a job needs of its devices

Expand only: the version before neither reads nor writes these columns. A job without needs runs anywhere, as before.
"""

import sqlalchemy as sa
from alembic import op

revision = "0013_device_abilities"
down_revision = "0012_fetches"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("devices", sa.Column("capability", sa.Integer(), nullable=True))
    op.add_column("devices", sa.Column("probed", sa.Text(), nullable=True))
    op.add_column("jobs", sa.Column("needs_gpu", sa.Boolean(), server_default=sa.text("false"), nullable=False))
    op.add_column("jobs", sa.Column("needs_bfloat16", sa.Boolean(), server_default=sa.text("false"), nullable=False))
    op.add_column("jobs", sa.Column("needs_capability", sa.Integer(), nullable=True))


def downgrade() -> None:
    for column in ("needs_capability", "needs_bfloat16", "needs_gpu"):
        op.drop_column("jobs", column)
    for column in ("probed", "capability"):
        op.drop_column("devices", column)
