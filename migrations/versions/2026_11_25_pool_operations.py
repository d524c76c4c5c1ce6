"""pool operations: limits of keys, soft budgets, policy of pools, first forecasts, audit"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002_pool"
down_revision = "0001"
branch_labels = None
depends_on = None

# `*` was everything; now it is everything in the key's own project. The installation's first key keeps the rest.
FIRST_KEY_OPERATES = """
update api_keys set scopes = scopes || '["admin"]'::jsonb
where id = (select min(id) from api_keys) and scopes ? '*' and not scopes ? 'admin'
"""


def upgrade() -> None:
    _limits()
    op.create_table(
        "pools",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("held", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("max_wait_seconds", sa.Float(), nullable=True),
        sa.Column("min_runtime_seconds", sa.Float(), nullable=True),
        sa.Column("preempt_grace_seconds", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_pools")),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("before", postgresql.JSONB(astext_type=sa.Text(), none_as_null=True), nullable=True),
        sa.Column("after", postgresql.JSONB(astext_type=sa.Text(), none_as_null=True), nullable=True),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name=op.f("fk_audit_key_id_api_keys")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
    )
    op.create_index("ix_audit_target", "audit", ["target", "id"])
    op.create_index("ix_attempts_ended_at", "attempts", ["ended_at"])
    op.create_index(
        "ix_jobs_measured", "jobs", ["base_model", "finished_at"], postgresql_where=sa.text("status = 'succeeded'")
    )
    op.execute(FIRST_KEY_OPERATES)


def _limits() -> None:
    op.add_column("projects", sa.Column("budget_soft_device_seconds", sa.Float(), nullable=True))
    op.add_column("api_keys", sa.Column("max_queued", sa.Integer(), nullable=True))
    op.add_column("api_keys", sa.Column("max_tier", sa.Text(), server_default=sa.text("'interactive'"), nullable=False))
    op.add_column("api_keys", sa.Column("max_priority", sa.Integer(), server_default=sa.text("100"), nullable=False))
    op.add_column("jobs", sa.Column("first_eta_low", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("first_eta_high", sa.DateTime(timezone=True), nullable=True))
    op.add_column("devices", sa.Column("ailment", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_index("ix_jobs_measured", table_name="jobs", postgresql_where=sa.text("status = 'succeeded'"))
    op.drop_index("ix_attempts_ended_at", table_name="attempts")
    op.drop_index("ix_audit_target", table_name="audit")
    op.drop_table("audit")
    op.drop_table("pools")
    op.drop_column("devices", "ailment")
    op.drop_column("jobs", "first_eta_high")
    op.drop_column("jobs", "first_eta_low")
    op.drop_column("api_keys", "max_priority")
    op.drop_column("api_keys", "max_tier")
    op.drop_column("api_keys", "max_queued")
    op.drop_column("projects", "budget_soft_device_seconds")
