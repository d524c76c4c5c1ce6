"""members: the further hosts of attempts that run on several"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0006_members"
down_revision = "0005_without_metadata"
branch_labels = None
depends_on = None

PHASES = "phase in ('called','staging','ready','training','ended')"


def _json() -> postgresql.JSONB:
    return postgresql.JSONB(none_as_null=True, astext_type=sa.Text())


def upgrade() -> None:
    op.add_column("attempts", sa.Column("meeting", _json(), nullable=True))
    op.add_column("attempts", sa.Column("dismissed_at", sa.DateTime(timezone=True), nullable=True))
    op.create_table(
        "members",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("node", sa.Integer(), nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("device_ids", _json(), nullable=False),
        sa.Column("phase", sa.Text(), server_default=sa.text("'called'"), nullable=False),
        sa.Column("leaving", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("heard_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("exit_code", sa.Integer(), nullable=True),
        sa.Column("error", _json(), nullable=True),
        sa.CheckConstraint(PHASES, name=op.f("ck_members_phase")),
        sa.ForeignKeyConstraint(
            ["job_id", "number"], ["attempts.job_id", "attempts.number"], name=op.f("fk_members_job_id_attempts")
        ),
        sa.PrimaryKeyConstraint("job_id", "number", "node", name=op.f("pk_members")),
    )
    op.create_index("ix_members_worker_id", "members", ["worker_id"], postgresql_where=sa.text("phase <> 'ended'"))


def downgrade() -> None:
    op.drop_table("members")
    op.drop_column("attempts", "dismissed_at")
    op.drop_column("attempts", "meeting")
