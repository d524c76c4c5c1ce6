"""preflights, measurements, and the rows of files that came in another format"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003_preflights"
down_revision = "0002_pool"
branch_labels = None
depends_on = None

NOW = sa.text("now()")


def json() -> postgresql.JSONB:
    return postgresql.JSONB(none_as_null=True, astext_type=sa.Text())


def upgrade() -> None:
    op.add_column("files", sa.Column("rows_key", sa.Text(), nullable=True))
    op.add_column("files", sa.Column("rows_sha256", sa.Text(), nullable=True))
    op.create_table(
        "preflights",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("seed", sa.Integer(), nullable=False),
        sa.Column("training_file", sa.Text(), nullable=False),
        sa.Column("validation_file", sa.Text(), nullable=True),
        sa.Column("request", json(), nullable=False),
        sa.Column("report", json(), nullable=True),
        sa.Column("error", json(), nullable=True),
        sa.Column("checker", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("check_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("status in ('queued','running','succeeded','failed')", name=op.f("ck_preflights_status")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_preflights_project_id_projects")),
        sa.ForeignKeyConstraint(["training_file"], ["files.id"], name=op.f("fk_preflights_training_file_files")),
        sa.ForeignKeyConstraint(["validation_file"], ["files.id"], name=op.f("fk_preflights_validation_file_files")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_preflights")),
    )
    op.create_index("ix_preflights_project_id_id", "preflights", ["project_id", "id"])
    op.create_index(
        "ix_preflights_waiting", "preflights", ["id"], postgresql_where=sa.text("status in ('queued','running')")
    )
    op.create_table(
        "measurements",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("method", sa.Text(), nullable=False),
        sa.Column("device_kind", sa.Text(), nullable=False),
        sa.Column("device_name", sa.Text(), nullable=False),
        sa.Column("pass_tokens", sa.BigInteger(), nullable=False),
        sa.Column("predicted_bytes", sa.BigInteger(), nullable=False),
        sa.Column("measured_bytes", sa.BigInteger(), nullable=False),
        sa.Column("trained_tokens", sa.BigInteger(), nullable=False),
        sa.Column("train_seconds", sa.Float(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_measurements_job_id_jobs")),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_measurements")),
    )
    op.create_index("ix_measurements_kind", "measurements", ["base_model", "method", "device_kind", "created_at"])


def downgrade() -> None:
    op.drop_table("measurements")
    op.drop_table("preflights")
    op.drop_column("files", "rows_sha256")
    op.drop_column("files", "rows_key")
