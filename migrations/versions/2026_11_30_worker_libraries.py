"""workers report the versions of the libraries that their trainers run on; expand only"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0035_worker_libraries"
down_revision = "0034_sweeps"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("workers", sa.Column("libraries", postgresql.JSONB(none_as_null=True), nullable=True))


def downgrade() -> None:
    op.drop_column("workers", "libraries")
