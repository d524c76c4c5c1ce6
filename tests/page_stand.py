"""An installation with something to look at: for the tests with a browser, and for the pictures of the docs."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import update

from shared.jobs.moves import claim_training
from shared.jobs import moves
from shared.lease.journal import NewEvent
from shared.store.db import session_scope
from shared.store.tables import ProjectRow, JobRow
from shared.tenants import keys
from tests.factories import claim_on, make_caller, make_file, make_queued_job, make_worker

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def chromium(**options: Any) -> Iterator[Any]:
    """A browser of the distribution; it fetches nothing."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], **options)
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


def figures(step: int, total: int, *, chance: random.Random, rate: float = 2e-4, ease: float = 1.0) -> dict[str, Any]:
    """Of a step of a made-up run: only for pages that are looked at."""
    part = step / total
    return {
        "step": step,
        "total_steps": total,
        "epoch": 3 * part,
        "train_loss": 0.42 + 1.9 * math.exp(-5 * part * ease) + chance.gauss(0, 0.045),
        "learning_rate": rate * min(1.0, 30 * part) * 0.5 * (1 + math.cos(math.pi * part)),
        "grad_norm": 0.35 + 0.9 * math.exp(-6 * part) + abs(chance.gauss(0, 0.06)),
        "trained_tokens": step * 8192 + chance.randrange(900),
        "seconds_per_step": 1.15 + abs(chance.gauss(0, 0.05)),
    }


def run(session: Any, worker: Any, caller: Any, *, until: int, total: int = 400, ease: float = 1.0, rate: float = 2e-4, seed: int = 1, **job: Any) -> Any:
    """A job that is being trained, as far as `until`."""
    chance = random.Random(seed)
    made = make_queued_job(session, caller, **job)
    claim = claim_on(session, worker)
    assert claim is not None and claim.lease.id == made.id
    events = []
    for step in range(1, until + 1):
        data = figures(step, total, chance=chance, ease=ease, rate=rate)
        events.append(NewEvent(f"Step {step}/{total}: training loss={data['train_loss']:.4g}", type="metrics", data=data))
        if step % 50 == 0:
            loss = data["train_loss"] + 0.06 + 0.02 * step / total
            events.append(NewEvent(f"Step {step}: validation loss={loss:.4g}", type="metrics", data={"step": step, "valid_loss": loss}))
            events.append(NewEvent(f"Checkpoint of step {step} saved"))
    moves.record(session, claim.lease, events, progress=None)
    return claim
