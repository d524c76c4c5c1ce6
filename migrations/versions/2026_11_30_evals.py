"""evals of OpenAI's wire, whose runs are evaluations; expand only: the version before passes over such runs"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0029_evals"
down_revision = "0028_key_secrets"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "evals",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("request", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_evals_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_evals")),
    )
    op.create_index(
        "ix_evals_project_id_id", "evals", ["project_id", "id"], postgresql_where=sa.text("deleted_at is null")
    )
    op.add_column("evaluations", sa.Column("eval_id", sa.Text(), nullable=True))
    op.add_column(
        "evaluations",
        sa.Column("run", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
    )
    op.create_foreign_key(op.f("fk_evaluations_eval_id_evals"), "evaluations", "evals", ["eval_id"], ["id"])
    op.create_index(
        "ix_evaluations_eval_id_id",
        "evaluations",
        ["eval_id", "id"],
        postgresql_where=sa.text("eval_id is not null and deleted_at is null"),
    )


def downgrade() -> None:
    op.drop_index("ix_evaluations_eval_id_id", table_name="evaluations")
    op.drop_constraint(op.f("fk_evaluations_eval_id_evals"), "evaluations")
    op.drop_column("evaluations", "run")
    op.drop_column("evaluations", "eval_id")
    op.drop_table("evals")
