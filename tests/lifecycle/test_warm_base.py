"""TUNEPOOL_KEEP_WARM=base with the real trainer: a second job finds its base quantised, and in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from shared.store.db import session_scope
from shared.store.tables import DeviceRow, JobRow
from tests.lifecycle.real_trainer import chat_file, open_real_stack, weights_of
from tests.lifecycle.stack import Servers, Stack, until
from tests.patience import patience

pytestmark = pytest.mark.timeout(patience(600))

ROWS = chat_file(12)
QLORA = {"adapter": {"method": "qlora", "r": 4}, "training": {"max_length": 256, "num_train_epochs": 1}}


@pytest.fixture
def stack(servers: Servers, tmp_path: Path) -> Iterator[Stack]:
    known = {
        "TUNEPOOL_KEEP_WARM": "base",
        "TUNEPOOL_EVALUATOR": "tests.fake_evaluator",  # evaluations have a spare as well; theirs loads PyTorch
        "TUNEPOOL_LEASE_SECONDS": "3600",
    }
    with open_real_stack(tmp_path, servers, **known) as made:
        made.start_worker()
        made.start_janitor()
        made.wait_for_worker()
        if files_open(made):
            pytest.skip("nothing keeps programs from this host's files: no form is kept here")
        yield made
        broken = made.broken_invariants()
    assert broken == []


def files_open(stack: Stack) -> bool:
    told = log_of(stack)
    return "files=open" in told or "FILES OPEN" in told


def log_of(stack: Stack) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", (stack.home / "worker-home.log").read_text())


def trained(stack: Stack, **tunepool: Any) -> JobRow:
    job_id = stack.submit_file(stack.upload(ROWS), seed=7, **{**QLORA, **tunepool})
    job = stack.wait(job_id, seconds=240)
    assert job.status == "succeeded", job.error
    return job


def warm_base(stack: Stack) -> str | None:
    with session_scope(stack.engine) as session:
        return session.scalars(select(DeviceRow.warm_base)).one()


def forms(stack: Stack) -> list[Path]:
    return [place for place in stack.home.rglob("prepared-*") if place.is_dir() and place.suffix == ""]


def test_the_base_of_the_last_job_waits_in_memory_and_gives_the_same_adapter(stack: Stack) -> None:
    cold = trained(stack)
    until(lambda: warm_base(stack) == "tiny", seconds=240, what="a spare that holds the base")
    (form,) = forms(stack)

    warm = trained(stack)

    (given,) = re.findall(rf"spare\.handed_over.*\bjob_id={warm.id}\b.*\bpid=(\d+)", log_of(stack))
    assert re.search(rf"spare\.ready.*\bbase=tiny\b.*\bpid={given}\b", log_of(stack))
    assert weights_of(warm) == weights_of(cold)

    # Spoilt by nobody we know: nobody gets it, the job is trained all the same, and it is made anew.
    until(lambda: warm_base(stack) == "tiny", seconds=240, what="a spare that holds the base again")
    weights = form / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    other = trained(stack, quantization={"bnb_4bit_quant_type": "fp4"})  # lets go of what was held
    weights.write_bytes(content)
    again = trained(stack)

    assert "prepared_base.refused" in log_of(stack)
    assert weights_of(again) == weights_of(cold)
    assert weights_of(other) != weights_of(cold)
    until(lambda: form.is_dir() and weights.read_bytes() != bytes(content), seconds=240, what="the form made anew")
