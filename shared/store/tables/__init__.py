"""All rows. Only verbs in `shared` touch them; doors never do.

The one door to the tables: a foreign key names its table by a word, so whoever has one table needs all of them.
"""

from shared.store.tables.alias_tables import AliasRow, AliasVersionRow, ApprovalRow, PromotionRow
from shared.store.tables.column_types import Json, Leased
from shared.store.tables.evaluation_tables import EvalRow, EvaluationAnswerRow, EvaluationRow
from shared.store.tables.job_tables import (
    AttemptRow,
    CheckpointRow,
    EventRow,
    IdempotencyRow,
    JobLabelRow,
    JobRow,
    LogPieceRow,
    MeasurementRow,
    MemberRow,
)
from shared.store.tables.key_tables import KeySecretRow, OidcRuleRow
from shared.store.tables.pool_tables import DeviceRow, PlaygroundRow, PoolRow, WorkerRow
from shared.store.tables.product_tables import (
    AdapterRow,
    AddedModelRow,
    BaseModelRow,
    ExportRow,
    FetchRow,
    FileRow,
    MergeRow,
    PermissionRow,
    PreflightRow,
)
from shared.store.tables.schedule_tables import ScheduleRow, ScheduleRunRow
from shared.store.tables.sweep_tables import SweepRow, TrialRow
from shared.store.tables.tenant_tables import (
    ApiKeyRow,
    AuditRow,
    OrganizationRow,
    ProjectRow,
    SigningKeyRow,
    SignInRow,
)
from shared.store.tables.tracking_tables import ProjectSecretRow, TrackingRow
from shared.store.tables.upload_tables import UploadPartRow, UploadRow
from shared.store.tables.webhook_tables import DeliveryRow, WebhookRow

__all__ = [
    "AdapterRow",
    "AddedModelRow",
    "AliasRow",
    "AliasVersionRow",
    "ApiKeyRow",
    "ApprovalRow",
    "AttemptRow",
    "AuditRow",
    "BaseModelRow",
    "CheckpointRow",
    "DeliveryRow",
    "DeviceRow",
    "EvalRow",
    "EvaluationAnswerRow",
    "EvaluationRow",
    "EventRow",
    "ExportRow",
    "FetchRow",
    "FileRow",
    "IdempotencyRow",
    "JobLabelRow",
    "JobRow",
    "Json",
    "KeySecretRow",
    "Leased",
    "LogPieceRow",
    "MeasurementRow",
    "MemberRow",
    "MergeRow",
    "OidcRuleRow",
    "OrganizationRow",
    "PermissionRow",
    "PlaygroundRow",
    "PoolRow",
    "PreflightRow",
    "ProjectRow",
    "ProjectSecretRow",
    "PromotionRow",
    "ScheduleRow",
    "ScheduleRunRow",
    "SignInRow",
    "SigningKeyRow",
    "SweepRow",
    "TrackingRow",
    "TrialRow",
    "UploadPartRow",
    "UploadRow",
    "WebhookRow",
    "WorkerRow",
]
