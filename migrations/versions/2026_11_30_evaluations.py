"""evaluations: what was asked, what came of it, and each answer as it comes

Expand only: the version before knows neither table.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0017_evaluations"
down_revision = "0016_playgrounds"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "evaluations",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("request", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False),
        sa.Column("targets", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False),
        sa.Column("file_id", sa.Text(), nullable=True),
        sa.Column("items", sa.Integer(), nullable=True),
        sa.Column("answered", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("device", sa.Text(), nullable=True),
        sa.Column("report", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column("error", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("fence", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("failures", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("lease_owner", sa.Text(), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "status in ('queued','running','succeeded','failed','cancelled')", name=op.f("ck_evaluations_status")
        ),
        sa.CheckConstraint(
            "(status = 'succeeded') = (report is not null)", name=op.f("ck_evaluations_success_has_report")
        ),
        sa.CheckConstraint(
            "(status in ('succeeded','failed','cancelled')) = (finished_at is not null)",
            name=op.f("ck_evaluations_end_has_moment"),
        ),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_evaluations_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_evaluations")),
    )
    op.create_index(
        "ix_evaluations_project_id_id",
        "evaluations",
        ["project_id", "id"],
        postgresql_where=sa.text("deleted_at is null"),
    )
    op.create_index(
        "ix_evaluations_unfinished",
        "evaluations",
        ["id"],
        postgresql_where=sa.text("status in ('queued','running') and deleted_at is null"),
    )
    op.create_table(
        "evaluation_answers",
        sa.Column("evaluation_id", sa.Text(), nullable=False),
        sa.Column("part", sa.Text(), nullable=False),
        sa.Column("item", sa.Integer(), nullable=False),
        sa.Column("subject", sa.Integer(), nullable=False),
        sa.Column("document", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False),
        sa.CheckConstraint("part in ('items','forgetting')", name=op.f("ck_evaluation_answers_part")),
        sa.ForeignKeyConstraint(
            ["evaluation_id"],
            ["evaluations.id"],
            name=op.f("fk_evaluation_answers_evaluation_id_evaluations"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("evaluation_id", "part", "item", "subject", name=op.f("pk_evaluation_answers")),
    )


def downgrade() -> None:
    op.drop_table("evaluation_answers")
    op.drop_table("evaluations")
