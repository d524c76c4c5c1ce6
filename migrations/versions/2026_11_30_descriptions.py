"""what a program of the trainer tells of a base model without its weights: its template, and how it is built

Expand only: the version before leaves the column empty.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0024_descriptions"
down_revision = "0023_fetch_codes"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("base_models", sa.Column("description", postgresql.JSONB(), nullable=True))


def downgrade() -> None:
    op.drop_column("base_models", "description")
