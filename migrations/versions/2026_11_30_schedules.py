"""schedules and their runs; promotions that need approvals; webhooks that are told of both

Expand only: the version before knows no such tables, and asks nothing of the new columns.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0033_schedules"
down_revision = "0032_cluster"
branch_labels = None
depends_on = None


def _json() -> postgresql.JSONB:
    return postgresql.JSONB(none_as_null=True, astext_type=sa.Text())


def _moment(name: str, *, now: bool = False, nullable: bool = True) -> sa.Column:
    default = sa.text("now()") if now else None
    return sa.Column(name, sa.DateTime(timezone=True), server_default=default, nullable=nullable and not now)


def _text(name: str, *, nullable: bool = False) -> sa.Column:
    return sa.Column(name, sa.Text(), nullable=nullable)


def _key(table: str, column: str, of: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [f"{of}.id"], name=op.f(f"fk_{table}_{column}_{of}"))


def upgrade() -> None:
    _schedules()
    _promotions()
    op.add_column("aliases", sa.Column("approvals", sa.Integer(), server_default=sa.text("0"), nullable=False))
    op.add_column("aliases", sa.Column("approvers", _json(), nullable=True))
    op.add_column("alias_versions", sa.Column("approved_by", _json(), nullable=True))
    op.add_column("webhook_deliveries", _text("subject", nullable=True))
    op.add_column("webhook_deliveries", sa.Column("details", _json(), nullable=True))


def _schedules() -> None:
    op.create_table(
        "schedules",
        *(_text(name) for name in ("id", "project_id", "key_id", "name")),
        _text("cron", nullable=True),
        _text("time_zone"),
        _text("data_prefix", nullable=True),
        sa.Column("request", _json(), nullable=False),
        _text("overlap"),
        sa.Column("skip_unchanged", sa.Boolean(), nullable=False),
        _moment("next_at"),
        _text("seen_file", nullable=True),
        _moment("paused_at"),
        _moment("created_at", now=True),
        _moment("deleted_at"),
        sa.CheckConstraint("cron is not null or data_prefix is not null", name=op.f("ck_schedules_has_trigger")),
        sa.CheckConstraint("overlap in ('skip','queue','supersede')", name=op.f("ck_schedules_overlap")),
        _key("schedules", "project_id", "projects"),
        _key("schedules", "key_id", "api_keys"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_schedules")),
    )
    live = sa.text("deleted_at is null")
    op.create_index(
        "uq_schedules_project_id_name", "schedules", ["project_id", "name"], unique=True, postgresql_where=live
    )
    op.create_index("ix_schedules_next_at", "schedules", ["next_at"], postgresql_where=live)
    op.create_table(
        "schedule_runs",
        _text("id"),
        _text("schedule_id"),
        _moment("due_at", nullable=False),
        _text("cause"),
        _text("verdict"),
        _text("code", nullable=True),
        _text("reason"),
        sa.Column("missed", sa.Integer(), server_default=sa.text("0"), nullable=False),
        _text("job_id", nullable=True),
        _text("content", nullable=True),
        _moment("created_at", now=True),
        sa.CheckConstraint("cause in ('cron','change','by_hand')", name=op.f("ck_schedule_runs_cause")),
        sa.CheckConstraint("verdict in ('started','skipped','refused')", name=op.f("ck_schedule_runs_verdict")),
        sa.CheckConstraint(
            "(verdict = 'started') = (job_id is not null)", name=op.f("ck_schedule_runs_started_has_job")
        ),
        _key("schedule_runs", "schedule_id", "schedules"),
        _key("schedule_runs", "job_id", "jobs"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_schedule_runs")),
        sa.UniqueConstraint("schedule_id", "due_at", name=op.f("uq_schedule_runs_schedule_id_due_at")),
    )


def _promotions() -> None:
    op.create_table(
        "promotions",
        *(_text(name) for name in ("id", "project_id", "alias_id", "key_id", "model", "model_id")),
        sa.Column("from_version", sa.Integer(), nullable=False),
        sa.Column("wish", _json(), nullable=False),
        sa.Column("gate", _json(), nullable=True),
        _text("reason", nullable=True),
        sa.Column("state", sa.Text(), server_default=sa.text("'pending'"), nullable=False),
        *(_text(name, nullable=True) for name in ("outcome", "code", "ended_by")),
        sa.Column("version", sa.Integer(), nullable=True),
        _moment("created_at", now=True),
        _moment("expires_at", nullable=False),
        _moment("ended_at"),
        sa.CheckConstraint(
            "state in ('pending','moved','withdrawn','expired','overtaken','refused')", name=op.f("ck_promotions_state")
        ),
        sa.CheckConstraint("(state = 'pending') = (ended_at is null)", name=op.f("ck_promotions_ended")),
        _key("promotions", "project_id", "projects"),
        _key("promotions", "alias_id", "aliases"),
        _key("promotions", "key_id", "api_keys"),
        _key("promotions", "ended_by", "api_keys"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_promotions")),
    )
    op.create_index(
        "uq_promotions_pending",
        "promotions",
        ["alias_id", "model_id"],
        unique=True,
        postgresql_where=sa.text("state = 'pending'"),
    )
    op.create_index("ix_promotions_project_id", "promotions", ["project_id", "id"])
    op.create_table(
        "promotion_approvals",
        _text("promotion_id"),
        _text("key_id"),
        _moment("created_at", now=True),
        _key("promotion_approvals", "promotion_id", "promotions"),
        _key("promotion_approvals", "key_id", "api_keys"),
        sa.PrimaryKeyConstraint("promotion_id", "key_id", name=op.f("pk_promotion_approvals")),
    )


def downgrade() -> None:
    op.drop_column("webhook_deliveries", "details")
    op.drop_column("webhook_deliveries", "subject")
    op.drop_column("alias_versions", "approved_by")
    op.drop_column("aliases", "approvers")
    op.drop_column("aliases", "approvals")
    op.drop_table("promotion_approvals")
    op.drop_table("promotions")
    op.drop_table("schedule_runs")
    op.drop_table("schedules")
