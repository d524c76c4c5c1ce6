"""An installation with something to look at: for the tests with a browser, and for the pictures of the docs."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy.orm import Session

from shared.contract.documents import JobProgress
from shared.jobs import moves
from shared.lease.journal import NewEvent
from shared.lease.values import Claim
from shared.store.tables import WorkerRow
from shared.tenants.keys import Caller
from tests.factories import claim_on, make_queued_job

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of the distribution; it fetches nothing."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield opened
        finally:
            opened.close()


def rows(count: int = 24) -> bytes:
    """A small training file of chats."""
    topics = ["a late parcel", "a lost password", "an invoice", "a broken screen", "a refund", "opening hours"]
    lines = [
        {
            "messages": [
                {"role": "system", "content": "You answer customers of a shop, briefly."},
                {"role": "user", "content": f"I write about {topics[number % 6]}, ticket {number}."},
                {"role": "assistant", "content": f"Thank you. We look into {topics[number % 6]} today."},
            ]
        }
        for number in range(count)
    ]
    return "\n".join(json.dumps(line) for line in lines).encode()


def figures(step: int, total: int, *, chance: random.Random, rate: float, ease: float) -> dict[str, Any]:
    """Of a step of a made-up run: only for pages that are looked at."""
    part = step / total
    return {
        "step": step,
        "total_steps": total,
        "epoch": 3 * part,
        "train_loss": 0.42 + 1.9 * math.exp(-5 * part * ease) + chance.gauss(0, 0.045),
        "learning_rate": rate * min(1.0, 30 * part) * 0.5 * (1 + math.cos(math.pi * part)),
        "grad_norm": 0.35 + 0.9 * math.exp(-6 * part) + abs(chance.gauss(0, 0.06)),
        "trained_tokens": step * 8192,
        "seconds_per_step": 1.15 + abs(chance.gauss(0, 0.05)),
        "memory_bytes": int(2**30 * (10.4 + 0.6 * min(1.0, 8 * part) + abs(chance.gauss(0, 0.02)))),
    }


def train(
    session: Session,
    workers: Sequence[WorkerRow],
    caller: Caller,
    *,
    until: int,
    total: int = 400,
    ease: float = 1.0,
    rate: float = 2e-4,
    **job: Any,
) -> Claim:
    """A job that is being trained, and has come to step `until`."""
    chance = random.Random(until)
    make_queued_job(session, caller, **job)
    claim = next(filter(None, (claim_on(session, worker) for worker in workers)), None)
    assert claim is not None
    moves.set_phase(session, claim.lease, "training")
    events, data = [NewEvent(f"Training 4,884,480 of 139,400,064 parameters (3.50 %) for {total} steps")], {}
    valid = 0.0
    for step in range(1, until + 1):
        data = figures(step, total, chance=chance, rate=rate, ease=ease)
        text = f"Step {step}/{total}: training loss={data['train_loss']:.4g}"
        events.append(NewEvent(text, type="metrics", data=data))
        if step % 50 == 0:
            valid = data["train_loss"] + 0.06 + 0.1 * (step / total) ** 2
            told = NewEvent(
                f"Step {step}: validation loss={valid:.4g}", type="metrics", data={"step": step, "valid_loss": valid}
            )
            events += [told, NewEvent(f"Checkpoint of step {step} saved")]
            figures_kept = {"step": step, "train_loss": data["train_loss"], "full_valid_loss": valid}
            manifest = {
                "prefix": f"c/{step}",
                "files": [{"name": "adapter_model.safetensors", "bytes": 9_800_000, "sha256": "0" * 64}],
            }
            name = f"{claim.model_name}:ckpt-step-{step}"
            moves.record_checkpoint(session, claim.lease, step=step, name=name, metrics=figures_kept, manifest=manifest)
    progress = JobProgress(
        step=until,
        total_steps=total,
        epoch=data["epoch"],
        train_loss=round(data["train_loss"], 4),
        valid_loss=valid or None,
        trained_tokens=data["trained_tokens"],
        seconds_per_step=1.2,
        seconds_left=1.2 * (total - until),
    )
    moves.record(session, claim.lease, events, progress=progress)
    return claim
