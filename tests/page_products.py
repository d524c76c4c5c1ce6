"""What the page shows beside jobs, as rows, with the same words in every field that a tenant writes."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared.contract.evaluation import EvaluationReport
from shared.contract.evaluation_run import StoredAnswer
from shared.contract.preflight_report import Report
from shared.ids import new_id
from shared.store.tables import (
    AdapterRow,
    AliasRow,
    AliasVersionRow,
    DeliveryRow,
    EvaluationAnswerRow,
    EvaluationRow,
    ExportRow,
    MergeRow,
    OidcRuleRow,
    PreflightRow,
    PromotionRow,
    ScheduleRow,
    ScheduleRunRow,
    SweepRow,
    TrialRow,
    WebhookRow,
)
from shared.tenants import keys
from shared.tenants.keys import Caller

ALIAS = "support-bot@prod"


def make_evaluation(session: Session, caller: Caller, words: str, *, items: int = 3, tuned: str | None = None) -> str:
    """Base against tuned, with figures, a slice and `items` items."""
    subjects = ["smollm2-135m-instruct", tuned or f"ft:{words}"[:300]]
    figure = {"n": items, "mean": 0.5, "low": 0.25, "high": 0.75}
    figures = {name: {"measures": {"right": figure}, "failures": 0} for name in subjects}
    difference = {"subject": subjects[1], "against": subjects[0], "measure": "right", **figure}
    part: dict[str, Any] = {"subjects": figures, "differences": [difference], "items": items, "failures": 0}
    report = {
        **part,
        "measures": {"right": {"type": "exact_match", "better": "higher"}},
        "slices": [{"key": words, "value": words, "items": 1, "subjects": figures}],
        "forgetting": part,
        "resamples": 10,
        "seed": 1,
    }
    EvaluationReport.model_validate(report)
    row = EvaluationRow(
        id=new_id("eval_"),
        project_id=caller.project_id,
        status="succeeded",
        request={
            "name": words[:100],
            "subjects": subjects,
            "against": subjects[0],
            "items": {"type": "suite", "suite": "general"},
            "measures": [{"type": "exact_match", "name": "right"}],
        },
        targets=[],
        items=items,
        answered=2 * items,
        device=words,
        report=report,
        finished_at=session.scalar(select(func.now())),
    )
    session.add(row)
    session.flush()
    for item in range(1, items + 1):
        for subject in (0, 1):
            session.add(_answer(row.id, item, subject, words))
    session.flush()
    return row.id


def _answer(evaluation_id: str, item: int, subject: int, words: str) -> EvaluationAnswerRow:
    document = {
        "part": "items",
        "item": item,
        "subject": subject,
        "line": item,
        "prompt": f"question {item} {words}",
        "reference": words,
        "answer": f"answer {item} of {subject} {words}",
        "finish_reason": "stop",
        "tokens": 3,
        "seconds": 0.1,
        "slices": {words: words},
        "scores": {"right": float(subject)},
        "problems": {"other": words},
        "error": None,
    }
    StoredAnswer.model_validate(document)
    return EvaluationAnswerRow(evaluation_id=evaluation_id, part="items", item=item, subject=subject, document=document)


def make_alias(session: Session, caller: Caller, words: str, *, job_id: str) -> str:
    """Two versions of an alias, the second by force."""
    adapter = session.scalars(select(AdapterRow).where(AdapterRow.job_id == job_id)).one()
    row = AliasRow(
        id=new_id("alias_"),
        project_id=caller.project_id,
        name=ALIAS,
        version=2,
        model_id=adapter.id,
        fallback_id=adapter.id,
        movers=[words],
    )
    session.add(row)
    session.flush()
    stated = {"status": "failed", "assert": words, "reason": words, "figures": {}}
    gate = {"status": "failed", "assertions": [stated]}
    for number in (1, 2):
        session.add(
            AliasVersionRow(
                id=new_id("aliasver_"),
                alias_id=row.id,
                number=number,
                kind="promote",
                model=adapter.name,
                model_id=adapter.id,
                base_model=adapter.base_model,
                job_id=job_id,
                gate=gate,
                forced=number == 2,
                reason=words,
                key_id=caller.key_id,
            )
        )
    session.flush()
    return row.name


def make_webhook(session: Session, caller: Caller, words: str) -> str:
    """A webhook that has failed; its secret is none."""
    row = WebhookRow(
        id=new_id("webhook_"),
        project_id=caller.project_id,
        name=words,
        url=f"https://ci.example/{words}",
        event_types=["fine_tuning.job.succeeded"],
        secret="sealed",
        secret_hint="hint",
        enabled=False,
        disabled_reason=words,
    )
    session.add(row)
    session.flush()
    session.add(
        DeliveryRow(
            id=new_id("delivery_"),
            project_id=caller.project_id,
            webhook_id=row.id,
            event_id=new_id("evt_"),
            event_type="fine_tuning.job.succeeded",
            state="failed",
            tries=1,
            log=[{"at": 1, "status": 500, "error": words, "seconds": 0.5}],
            finished_at=session.scalar(select(func.now())),
        )
    )
    session.flush()
    return row.id


def make_merge(session: Session, caller: Caller, words: str, *, adapter: str) -> str:
    """A merge that has failed."""
    row = MergeRow(
        id=new_id("merge_"),
        project_id=caller.project_id,
        kind="merge",
        status="failed",
        request={"adapter": adapter, "onto": "base"},
        base_model="smollm2-135m-instruct",
        spec={},
        error={"code": "merge_failed", "message": words, "param": None},
        finished_at=session.scalar(select(func.now())),
    )
    session.add(row)
    session.flush()
    return row.id


def make_promotion(session: Session, caller: Caller, words: str, *, alias: str) -> str:
    """A promotion that another key of the project has asked for, and that waits for approvals."""
    row = session.scalars(
        select(AliasRow).where(AliasRow.name == alias, AliasRow.project_id == caller.project_id)
    ).one()
    wish = {"model": f"ft:{words}"[:300], "force": True, "reason": words}
    promotion = PromotionRow(
        id=new_id("promo_"),
        project_id=caller.project_id,
        alias_id=row.id,
        key_id=caller.key_id,
        model=wish["model"],
        model_id=new_id("adapter_"),
        from_version=row.version,
        wish=wish,
        gate={"status": "failed", "assertions": []},
        reason=words,
        expires_at=session.scalars(select(func.now())).one() + timedelta(days=7),
    )
    session.add(promotion)
    session.flush()
    return promotion.id


def make_export(session: Session, caller: Caller, words: str, *, adapter: str) -> str:
    """An export that has failed."""
    row = ExportRow(
        id=new_id("export_"),
        project_id=caller.project_id,
        kind="gguf",
        status="failed",
        request={"adapter": adapter, "format": "gguf", "quantization": "q8_0", "onto": "base"},
        base_model="smollm2-135m-instruct",
        spec={},
        error={"code": "export_failed", "message": words, "param": None},
        finished_at=session.scalar(select(func.now())),
    )
    session.add(row)
    session.flush()
    return row.id


def make_schedule(session: Session, caller: Caller, words: str, *, job_id: str) -> str:
    """A schedule with a run that has started a job, and one that was refused."""
    row = ScheduleRow(
        id=new_id("sched_"),
        project_id=caller.project_id,
        key_id=caller.key_id,
        name="nightly",
        cron="0 3 * * *",
        time_zone="UTC",
        data_prefix=words,
        request={"model": "smollm2-135m-instruct", "suffix": None, "metadata": {"a": words}},
        overlap="skip",
        skip_unchanged=True,
        next_at=session.scalars(select(func.now())).one() + timedelta(days=1),
    )
    session.add(row)
    session.flush()
    now = session.scalars(select(func.now())).one()
    verdicts: tuple[dict[str, Any], ...] = (
        {"verdict": "started", "job_id": job_id},
        {"verdict": "refused", "code": words},
    )
    for hours, values in zip((2, 1), verdicts, strict=True):
        session.add(
            ScheduleRunRow(
                id=new_id("srun_"),
                schedule_id=row.id,
                due_at=now - timedelta(hours=hours),
                cause="cron",
                reason=words,
                missed=2,
                **values,
            )
        )
        session.flush()
    return row.name


def make_sweep(session: Session, caller: Caller, words: str, *, job_id: str, status: str = "running") -> str:
    """One trial with a job, one that was refused. A janitor that looks on needs the sweep paused."""
    field = "tunepool.training.learning_rate"
    request = {
        "name": words[:64],
        "job": {"model": "smollm2-135m-instruct", "training_file": "file-a", "validation_file": "file-b"},
        "parameters": {field: {"values": [0.1, 0.2]}},
        "strategy": {"type": "grid"},
        "metadata": {"a": words},
    }
    row = SweepRow(
        id=new_id("sweep_"),
        project_id=caller.project_id,
        key_id=caller.key_id,
        request_sha256="0" * 64,
        request=request,
        base={},
        detail=words,
        status=status,
    )
    session.add(row)
    session.flush()
    error = {"code": "x", "message": words, "param": None}
    for number, values in enumerate(
        ({"state": "started", "job_id": job_id, "looks": [[1, 0.5, 0.5]]}, {"state": "failed", "error": error})
    ):
        session.add(
            TrialRow(
                sweep_id=row.id, number=number, settings={field: 0.1}, request=request["job"], reason=words, **values
            )
        )
    session.flush()
    return row.id


def make_oidc_rule(session: Session, caller: Caller, words: str) -> str:
    key, _ = keys.create(session, project_id=caller.project_id, name=words, scopes=("jobs:write",))
    rule_id = new_id("oidcrule_")
    session.add(
        OidcRuleRow(
            id=rule_id,
            project_id=caller.project_id,
            key_id=key.id,
            issuer="https://token.actions.githubusercontent.com",
            audience=words,
            claims={words[:100]: words},
            life_seconds=600,
        )
    )
    session.flush()
    return rule_id


def make_preflight(session: Session, caller: Caller, words: str, *, file_id: str) -> str:
    """One whose file has a fault, a warning and a row with its mask."""
    tokens = {"id": 1, "text": words, "trained": True}
    rows: dict[str, Any] = {"count": 0, "rows": []}
    figures: dict[str, Any] = dict.fromkeys(
        [
            "rows",
            "tokens",
            "kept_tokens",
            "trained_tokens",
            "mean_tokens",
            "median_tokens",
            "p95_tokens",
            "longest_row",
            "longest_tokens",
            "fault_count",
        ],
        1,
    )
    training = {
        **figures,
        "histogram": [{"up_to": 8, "rows": 3}],
        "truncated": rows,
        "empty": rows,
        "duplicates": rows,
        "faults": [{"row": 1, "code": "x", "message": words}],
    }
    sequence = {
        "name": "row",
        "text": words,
        "token_count": 1,
        "trained_token_count": 1,
        "tokens": [tokens],
        "spans": [],
    }
    report: dict[str, Any] = {
        "ok": False,
        "refusal": {"code": "invalid_file", "message": words},
        "files": {
            "training": {
                "id": file_id,
                "problem_count": 1,
                "problems": [{"line": 3, "column": 1, "param": words, "code": "bad_json", "message": words}],
            }
        },
        "warnings": [words],
        "devices": [
            {
                "id": "d",
                "name": words,
                "kind": "cuda",
                "fits": False,
                "needed_bytes": 5,
                "offered_bytes": 3,
                "reason": words,
            }
        ],
        "auto": [{"field": words, "value": words, "reason": words}],
        "tokens": {
            "training": training,
            "validation": None,
            "leakage": None,
            "preview": [{"row": 1, "truncated": False, "sequences": [sequence], "fault": words}],
        },
    }
    Report.model_validate(report)
    row = PreflightRow(
        id=f"preflight_{caller.project_id[5:]}",
        project_id=caller.project_id,
        status="succeeded",
        base_model="smollm2-135m-instruct",
        seed=1,
        training_file=file_id,
        report=report,
        request={"model": "smollm2-135m-instruct", "training_file": file_id, "metadata": {"a": words}},
    )
    session.add(row)
    session.flush()
    return row.id
