"""`python -m examples.page_pictures [FOLDER [NAME…]]`: the page in light and dark, from a made-up team's pool.

Nothing trains here: the rows of jobs, figures and devices are written as a pool would write them. Needs the extra
`browser` and a Chromium of the distribution. Without FOLDER they go to docs/images.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from alembic import command
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared.contract.spec import Placement
from shared.jobs import moves, trainer_log
from shared.settings import Settings
from shared.store.db import make_engine, session_scope
from shared.store.tables import (
    AliasRow,
    AttemptRow,
    DeviceRow,
    FileRow,
    JobRow,
    PreflightRow,
    ProjectRow,
    ScheduleRunRow,
    SweepRow,
    TrialRow,
    WorkerRow,
)
from shared.tenants import audit, keys
from shared.tenants.keys import Caller
from standalone.postgres import EmbeddedPostgres
from tests import page_products
from tests.factories import GIB, make_file, make_key, make_queued_job, make_worker
from tests.live import live_api
from tests.page_stand import chromium, rows, train
from tests.servers import alembic_config, open_folder

SIZE = {"width": 1200, "height": 780}
MOST_BYTES = 170_000


@contextmanager
def team() -> Iterator[tuple[str, str, dict[str, str]]]:
    """A live API with a team's jobs; its address, a key, and ids by name."""
    with open_folder() as folder, tempfile.TemporaryDirectory() as home:
        server = EmbeddedPostgres(folder, durable=False)
        server.start()
        try:
            url = server.url("postgres")
            command.upgrade(alembic_config(url), "head")
            engine = make_engine(url)
            with session_scope(engine) as session:
                key, ids = fill(session)
            with live_api(Settings(home=Path(home), database_url=url, redis_url="")) as address:
                yield address, key, ids
            engine.dispose()
        finally:
            server.destroy()


def fill(session: Session) -> tuple[str, dict[str, str]]:
    """Three projects, six devices, a dozen jobs."""
    lead, key = make_key(session, name="Northwind", scopes=("*", "admin"), weight=2.0)
    others = [project(session, lead, name, weight) for name, weight in (("search", 1.0), ("speech", 1.0))]
    session.get_one(ProjectRow, lead.project_id).name = "support"
    keys.create(session, project_id=lead.project_id, name="nightly ci", scopes=("jobs:write", "files:write"))
    workers = [worker(session, f"gpu-{number}", count) for number, count in ((1, 2), (2, 2), (3, 2))]
    content = rows(480)
    file = make_file(
        session,
        lead,
        filename="tickets-2026-11.jsonl",
        bytes=len(content) * 40,
        sha256=hashlib.sha256(content).hexdigest(),
        report={"format": "chat", "shape": "chat", "rows": 19_200},
    )
    made = [("tickets", 1.0, 2e-4, 16), ("tickets-r32", 1.3, 1e-4, 32), ("tickets-high-rate", 0.8, 6e-4, 16)]
    ids: dict[str, str] = {"file": file.id}
    for name, ease, rate, rank in made:
        claim = train(
            session,
            workers,
            lead,
            until=400,
            ease=ease,
            rate=rate,
            file=file,
            suffix=name,
            metadata={"branch": "main", "sweep": "november"},
            tunepool={"adapter": {"r": rank}},
        )
        settle(session, claim.lease.id, rank=rank, rate=rate)
        manifest = {
            "prefix": "p",
            "files": [
                {"name": "adapter_model.safetensors", "bytes": 9_797_552, "sha256": "5f" * 32},
                {"name": "adapter_config.json", "bytes": 1_012, "sha256": "a1" * 32},
            ],
        }
        moves.succeed(session, claim.lease, manifest=manifest, trained_tokens=3_276_800, peak_bytes=11 * GIB)
        ids[name] = claim.lease.id
        ids["model"] = str(session.get_one(JobRow, claim.lease.id).fine_tuned_model)
    ids["project"] = lead.project_id
    spend(session, hours=5)
    failed = train(session, workers, lead, until=60, file=file, suffix="long-context", metadata={"branch": "long"})
    moves.fail(
        session,
        failed.lease,
        code="gpu_oom",
        message="The device's memory did not suffice: 21.4 GiB were estimated,"
        " 23.1 GiB were held when it failed. Lower training.max_length or adapter.r, or use method qlora.",
    )
    running = train(
        session,
        workers,
        lead,
        until=263,
        file=file,
        suffix="tickets-nightly",
        ease=1.1,
        metadata={"branch": "main", "git_sha": "9f3c1e2"},
    )
    settle(session, running.lease.id, rank=16, rate=2e-4)
    ids["running"] = running.lease.id
    for other in others:
        train(session, workers, other, until=120, suffix="theirs")
    gang = Placement(strategy="ddp", gpus=2)
    waiting = [
        make_queued_job(
            session, lead, file=file, suffix="tickets-70b", placement=Placement(strategy="ddp", gpus=2, nodes=4)
        )
    ]
    waiting += [make_queued_job(session, lead, file=file, suffix=f"sweep-{n}", placement=gang) for n in range(3)]
    ids["queued"] = waiting[0].id
    for other in others:
        make_queued_job(session, other, placement=gang)
    paused = make_queued_job(session, lead, file=file, suffix="archive")
    moves.request_pause(session, paused.id, project_id=lead.project_id)
    cancelled = make_queued_job(session, lead, file=file, suffix="typo")
    moves.request_cancel(session, cancelled.id, project_id=lead.project_id)
    audit.record(session, lead, "job.cancel", cancelled.id, after={"status": "cancelled"})
    ids["preflight"] = examine(session, lead, file)
    ids |= products(session, lead, ids)
    ids["newcomer"] = make_key(session, name="Southbank")[1]
    return key, ids


def products(session: Session, lead: Caller, ids: dict[str, str]) -> dict[str, str]:
    """An evaluation, an alias, a webhook, a schedule, a sweep, a merged model and a log."""
    tuned = str(session.get_one(JobRow, ids["tickets"]).fine_tuned_model)
    page_products.make_merge(session, lead, "There was no room for the merged weights.", adapter=tuned)
    printed = [
        "Loading the base model in 4 bits",
        *(f"step {step}: 8 rows, {step * 8192:,} tokens" for step in range(1, 264)),
        "HF_TOKEN=[hidden]",
    ]
    lines = "".join(f"{line}\n" for line in printed)
    fence = session.scalars(select(AttemptRow.fence).where(AttemptRow.job_id == ids["running"])).one()
    trainer_log.tell(session, ids["running"], fence, start=0, lines=lines, size=len(lines))
    alias = page_products.make_alias(session, lead, "it answers more briefly", job_id=ids["tickets"])
    session.execute(update(AliasRow).values(movers=None))
    page_products.make_oidc_rule(session, lead, "acme/tickets")
    return {
        "evaluation": page_products.make_evaluation(session, lead, "late parcels", items=8, tuned=tuned),
        "alias": alias,
        "webhook": page_products.make_webhook(session, lead, "ci"),
        "schedule": _schedule(session, lead, ids["tickets"]),
        "sweep": _sweep(session, lead, ids["tickets"]),
    }


def _schedule(session: Session, lead: Caller, job_id: str) -> str:
    """A schedule whose runs have the words that real ones have."""
    name = page_products.make_schedule(session, lead, "tickets-", job_id=job_id)
    started, other = session.scalars(select(ScheduleRunRow).order_by(ScheduleRunRow.due_at))
    started.reason, started.missed = f"Started {job_id}.", 0
    other.verdict, other.code, other.missed = "skipped", "unchanged", 0
    other.reason = f"Nothing changed since {job_id}."
    return name


def _sweep(session: Session, lead: Caller, job_id: str) -> str:
    """A sweep that somebody has paused, with a trial that it stopped."""
    sweep_id = page_products.make_sweep(session, lead, "rates", job_id=job_id, status="paused")
    session.get_one(SweepRow, sweep_id).detail = None
    first, second = session.scalars(select(TrialRow).order_by(TrialRow.number))
    first.state, first.reason = "succeeded", None
    second.settings = dict.fromkeys(second.settings, 0.2)
    second.state, second.reason, second.error = "stopped", "rank 2 of 2 at step 40 (valid_loss 2.25)", None
    return sweep_id


def project(session: Session, lead: Caller, name: str, weight: float) -> Caller:
    row = ProjectRow(
        id=f"proj_{hashlib.sha256(name.encode()).hexdigest()[:32]}",
        organization_id=lead.organization_id,
        name=name,
        weight=weight,
    )
    session.add(row)
    session.flush()
    return keys.authenticate(session, keys.create(session, project_id=row.id, name="team")[1])


def worker(session: Session, host: str, devices: int) -> WorkerRow:
    row = make_worker(session, devices=devices, name="NVIDIA L40S", total_bytes=46 * GIB, free_bytes=44 * GIB)
    row.host, row.version = host, "0.1.0"
    session.execute(update(DeviceRow).where(DeviceRow.worker_id == row.id).values(host=host, capability=89))
    return row


def settle(session: Session, job_id: str, *, rank: int, rate: float) -> None:
    """Reasons, as the CPU lane writes them."""
    row = session.get_one(JobRow, job_id)
    spec = dict(row.spec or {})
    spec["adapter"] = {**spec["adapter"], "r": rank, "lora_alpha": 2 * rank}
    spec["training"] = {**spec["training"], "learning_rate": rate}
    reasons = [
        ("training.learning_rate", rate, f"usual for rank {rank}, scaled for the size of the model"),
        ("training.batch_size", 8, "rows are short; eight keep the device busy"),
        ("training.max_length", 2048, "the longest row has 1,873 tokens"),
        ("training.num_train_epochs", 3, "19,200 rows"),
        ("adapter.lora_alpha", 2 * rank, "twice the rank"),
        ("training.gradient_checkpointing", True, "11.2 GiB fit without it only on devices with 24 GiB"),
    ]
    auto = [{"field": field, "value": value, "reason": reason} for field, value, reason in reasons]
    session.execute(update(JobRow).where(JobRow.id == job_id).values(spec=spec, auto=auto, device_seconds=5140.0))


def spend(session: Session, *, hours: int) -> None:
    """What has ended took its time."""
    session.execute(
        update(AttemptRow)
        .where(AttemptRow.ended_at.is_not(None))
        .values(started_at=func.now() - timedelta(hours=hours), ended_at=func.now() - timedelta(hours=hours - 1))
    )
    for index, name in enumerate(("support", "search", "speech")):
        session.execute(update(ProjectRow).where(ProjectRow.name == name).values(usage=(42_000, 31_000, 9_500)[index]))


def examine(session: Session, caller: Caller, file: FileRow) -> str:
    words = [
        ("<|im_start|>", 0),
        ("user", 0),
        ("\n", 0),
        ("My", 0),
        (" parcel", 0),
        (" has", 0),
        (" not", 0),
        (" arrived", 0),
        (".", 0),
        ("<|im_end|>", 0),
        ("\n", 0),
        ("<|im_start|>", 0),
        ("assistant", 0),
        ("\n", 0),
        ("I", 1),
        (" am", 1),
        (" sorry", 1),
        (".", 1),
        (" Your", 1),
        (" parcel", 1),
        (" left", 1),
        (" our", 1),
        (" house", 1),
        (" on", 1),
        (" Monday", 1),
        ("; I", 1),
        (" ask", 1),
        (" the", 1),
        (" courier", 1),
        (" now", 1),
        (".", 1),
        ("<|im_end|>", 1),
    ]
    tokens = [{"id": number, "text": word, "trained": bool(trained)} for number, (word, trained) in enumerate(words)]
    none = {"count": 0, "rows": []}
    bins = [(32, 900), (64, 3_800), (128, 7_100), (256, 4_900), (512, 1_900), (1024, 480), (2048, 120)]
    figures = {
        "rows": 19_200,
        "tokens": 3_310_000,
        "kept_tokens": 3_276_800,
        "trained_tokens": 1_140_000,
        "mean_tokens": 172.4,
        "median_tokens": 121,
        "p95_tokens": 540,
        "longest_row": 7_311,
        "longest_tokens": 1_873,
        "fault_count": 0,
        "histogram": [{"up_to": top, "rows": count} for top, count in bins],
        "truncated": none,
        "empty": none,
        "duplicates": {"count": 14, "rows": [3, 9]},
        "faults": [],
    }
    sequence = {
        "name": "row",
        "text": "",
        "token_count": len(words),
        "trained_token_count": 18,
        "tokens": tokens,
        "spans": [],
    }
    fits: Any = [("NVIDIA L40S", 46 * GIB, True), ("NVIDIA T4", 10 * GIB, False)]
    duration = {"device": "NVIDIA L40S", "expected": 1440, "low": 1290, "high": 1700, "basis": "7 finished jobs"}
    report = {
        "ok": True,
        "refusal": None,
        "files": {"training": {"id": file.id, "rows": 19_200}},
        "run": {"steps": 1200, "steps_per_epoch": 400, "rows": 19_186, "tokens": 9_830_400},
        "memory": {
            "predicted_bytes": 12_025_908_428,
            "upper_bytes": 13_421_772_800,
            "evaluation_bytes": 0,
            "sure": "measured",
            "measurements": 7,
            "terms": {},
        },
        "time": duration,
        "devices": [
            {
                "id": name,
                "name": name,
                "kind": "cuda",
                "fits": good,
                "needed_bytes": 12_025_908_428,
                "offered_bytes": offered,
                "reason": "It needs 11.2 GiB at the peak"
                + ("." if good else ", and 9.0 GiB of this device are offered."),
                "time": duration if good else None,
            }
            for name, offered, good in fits
        ],
        "auto": [{"field": "training.learning_rate", "value": 0.0002, "reason": "usual for rank 16"}],
        "tokens": {
            "training": figures,
            "validation": None,
            "leakage": None,
            "preview": [{"row": 1, "truncated": False, "sequences": [sequence]}],
        },
    }
    row = PreflightRow(
        id="preflight_01a229fc1b997718a1958acea9b95cd7",
        project_id=caller.project_id,
        status="succeeded",
        base_model="smollm2-135m-instruct",
        seed=1,
        training_file=file.id,
        report=report,
        request={"model": "smollm2-135m-instruct", "training_file": file.id},
    )
    session.add(row)
    session.flush()
    return row.id


def pages(ids: dict[str, str]) -> dict[str, str]:
    compared = "&".join(f"job={ids[name]}" for name in ("tickets", "tickets-r32", "tickets-high-rate"))
    return {
        "jobs": "/ui/jobs",
        "job": f"/ui/jobs/{ids['running']}",
        "waiting": f"/ui/jobs/{ids['queued']}",
        "pool": "/ui/pool",
        "compare": f"/ui/compare?{compared}",
        "new-job": "/ui/new",
        "check": f"/ui/preflights/{ids['preflight']}",
        "files": "/ui/files",
        "models": "/ui/models",
        "playground": "/ui/playground",
        "usage": "/ui/usage",
        "projects": "/ui/projects",
        "project": f"/ui/projects/{ids['project']}",
        "keys": "/ui/keys",
        "audit": "/ui/audit",
        "rules": "/ui/rules",
        "log": f"/ui/jobs/{ids['running']}#printed",
        "events": f"/ui/jobs/{ids['running']}/events",
        "checks": "/ui/preflights",
        "file": f"/ui/files/{ids['file']}",
        "model": f"/ui/models/{ids['model']}",
        "base-model": "/ui/models/base/smollm2-135m-instruct",
        "account": "/ui/account",
        "evaluations": "/ui/evaluations",
        "evaluation": f"/ui/evaluations/{ids['evaluation']}",
        "aliases": "/ui/aliases",
        "alias": f"/ui/aliases/{ids['alias']}",
        "webhooks": "/ui/webhooks",
        "webhook": f"/ui/webhooks/{ids['webhook']}",
        "schedules": "/ui/schedules",
        "schedule": f"/ui/schedules/{ids['schedule']}",
        "sweeps": "/ui/sweeps",
        "sweep": f"/ui/sweeps/{ids['sweep']}",
    }


def main(folder: Path, *names: str) -> None:
    """`names`: only these pages."""
    folder.mkdir(parents=True, exist_ok=True)
    with team() as (address, key, ids), chromium() as browser:
        visits = ((key, pages(ids)), (ids["newcomer"], {"first-start": "/ui/jobs"}))
        for scheme in ("light", "dark"):
            for who, paths in visits:
                wanted = {name: path for name, path in paths.items() if not names or name in names}
                if wanted:
                    visit(browser, address, who, wanted, folder=folder, scheme=scheme)


def visit(browser: Any, address: str, key: str, paths: dict[str, str], *, folder: Path, scheme: str) -> None:
    """Sign in, and take each page."""
    context = browser.new_context(viewport=SIZE, color_scheme=scheme, locale="en-GB", timezone_id="Europe/Berlin")
    page = context.new_page()
    page.on("console", lambda message: print("console:", message.text))
    page.goto(f"{address}/ui/sign-in")
    if "jobs" in paths:
        take(page, folder / f"page-sign-in-{scheme}.png")
    page.fill("[name=key]", key)
    page.click("button.main")
    page.wait_for_url("**/ui/jobs")
    for name, path in paths.items():
        page.goto(address + path)
        if page.locator("[data-curves]").count():
            page.wait_for_selector("[data-drawn=yes]", state="attached")
        take(page, folder / f"page-{name}-{scheme}.png")
    context.close()


def take(page: Any, file: Path) -> None:
    page.screenshot(path=file)
    if file.stat().st_size > MOST_BYTES:
        raise SystemExit(f"{file} has {file.stat().st_size:,} bytes; at most {MOST_BYTES:,} are kept in the repository")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "images", *sys.argv[2:])
