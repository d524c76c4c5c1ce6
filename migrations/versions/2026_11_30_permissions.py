"""checkpoint_permissions: which other projects may use a tuned model or a checkpoint

Expand only: the version before knows no such table, and lets nobody else use anything.
"""

import sqlalchemy as sa
from alembic import op

revision = "0021_permissions"
down_revision = "0020_webhooks"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "checkpoint_permissions",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("checkpoint", sa.Text(), nullable=False),
        sa.Column("owner_id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["owner_id"], ["projects.id"], name=op.f("fk_checkpoint_permissions_owner_id_projects")
        ),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name=op.f("fk_checkpoint_permissions_project_id_projects")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_checkpoint_permissions")),
        sa.UniqueConstraint("checkpoint", "project_id", name=op.f("uq_checkpoint_permissions_checkpoint_project_id")),
    )
    op.create_index("ix_checkpoint_permissions_project_id", "checkpoint_permissions", ["project_id"])


def downgrade() -> None:
    op.drop_table("checkpoint_permissions")
