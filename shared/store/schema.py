"""The schema revisions that this version knows. It refuses to work on a database that lacks one of them.

A newer schema is welcome: migrations only expand first, so the version before runs on it (docs/operations.md).
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import inspect, text
from sqlalchemy.orm import Session

from shared.errors import Unavailable

# As in migrations/versions, oldest first.
REVISIONS: Final = (
    "0001",
    "0002_pool",
    "0003_preflights",
    "0004_merges",
    "0005_without_metadata",
    "0006_members",
    "0007_unfinished_jobs",
    "0008_leases",
    "0009_base_models",
    "0010_superseded",
    "0011_models",
    "0012_fetches",
    "0013_device_abilities",
    "0014_walls",
    "0015_packed_files",
    "0016_playgrounds",
    "0017_evaluations",
    "0018_aliases",
    "0019_uploads",
    "0020_webhooks",
    "0021_permissions",
    "0022_sign_ins",
    "0023_fetch_codes",
    "0024_descriptions",
    "0025_metrics",
    "0026_parents",
    "0027_integrations",
    "0028_key_secrets",
    "0029_evals",
    "0030_signing",
    "0031_logs",
    "0032_cluster",
    "0033_schedules",
    "0034_sweeps",
    "0035_worker_libraries",
    "0036_exports",
    "0037_settled_for",
    "0038_queue_depth",
    "0039_job_traces",
    "0040_preflight_progress",
    "0041_delivery_counts",
    "0042_sweep_traces",
    "0043_warm_base",
    "0044_cotraining",
    "0045_job_labels",
    "0046_earlier_labels",
)


class SchemaOutdated(Unavailable):
    """The database has not been migrated to this version yet."""

    code = "schema_outdated"


def must_serve(session: Session) -> None:
    """Raises SchemaOutdated if a migration of this version is missing."""
    revision = None
    if inspect(session.connection()).has_table("alembic_version"):
        revision = session.scalar(text("select version_num from alembic_version"))
    if revision is None or revision in REVISIONS[:-1]:
        raise SchemaOutdated(
            f"The database has schema {revision or 'none'}, this version needs {REVISIONS[-1]}; run"
            " `tunepool-server migrate`."
        )
