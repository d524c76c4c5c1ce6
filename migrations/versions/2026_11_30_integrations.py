"""secrets of projects, what jobs tell to trackers, which trackers a worker can feed; expand only"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0027_integrations"
down_revision = "0026_parents"
branch_labels = None
depends_on = None

_MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "project_secrets",
        sa.Column("project_id", sa.Text(), sa.ForeignKey("projects.id"), primary_key=True),
        sa.Column("name", sa.Text(), primary_key=True),
        sa.Column("sealed", sa.Text(), nullable=False),
        sa.Column("created_at", _MOMENT, nullable=False, server_default=sa.func.now()),
        sa.Column("updated_at", _MOMENT, nullable=False, server_default=sa.func.now()),
    )
    op.create_table(
        "trackings",
        sa.Column("id", sa.Text(), primary_key=True),
        sa.Column("project_id", sa.Text(), sa.ForeignKey("projects.id"), nullable=False),
        sa.Column("job_id", sa.Text(), sa.ForeignKey("jobs.id"), nullable=False),
        sa.Column("place", sa.Integer(), nullable=False),
        sa.Column("tracker", sa.Text(), nullable=False),
        sa.Column("options", postgresql.JSONB(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False, server_default=sa.text("'waiting'")),
        sa.Column("cursor", sa.BigInteger(), nullable=False, server_default=sa.text("0")),
        sa.Column("last_step", sa.Integer(), nullable=True),
        sa.Column("run_id", sa.Text(), nullable=True),
        sa.Column("url", sa.Text(), nullable=True),
        sa.Column("file_id", sa.Text(), sa.ForeignKey("files.id"), nullable=True),
        sa.Column("tries", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.Column("failing_since", _MOMENT, nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("fence", sa.BigInteger(), nullable=False, server_default=sa.text("0")),
        sa.Column("failures", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.Column("lease_owner", sa.Text(), nullable=True),
        sa.Column("lease_until", _MOMENT, nullable=True),
        sa.Column("created_at", _MOMENT, nullable=False, server_default=sa.func.now()),
        sa.Column("finished_at", _MOMENT, nullable=True),
        sa.CheckConstraint("tracker in ('wandb','mlflow','tensorboard')", name="tracker"),
        sa.CheckConstraint("state in ('waiting','done','failed')", name="state"),
        sa.UniqueConstraint("job_id", "place"),
    )
    op.create_index("ix_trackings_waiting", "trackings", ["id"], postgresql_where=sa.text("state = 'waiting'"))
    op.add_column("workers", sa.Column("trackers", postgresql.JSONB(), nullable=True))


def downgrade() -> None:
    op.drop_column("workers", "trackers")
    op.drop_table("trackings")
    op.drop_table("project_secrets")
