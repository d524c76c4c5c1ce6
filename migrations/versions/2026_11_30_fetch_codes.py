"""why a fetch of a base model was refused, as a code: what only people can mend ends the jobs that wait for it

Expand only: the version before leaves the column empty, and knows no job that waits for a fetch.
"""

import sqlalchemy as sa
from alembic import op

revision = "0023_fetch_codes"
down_revision = "0022_sign_ins"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("fetches", sa.Column("code", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("fetches", "code")
