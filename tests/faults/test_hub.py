"""The source of base models is away (fault 62)."""

from __future__ import annotations

import json
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.plan.verdicts import Verdict
from shared.settle.catalogue import load_catalogue, local_folder
from shared.store.tables import FetchRow
from tests.factories import verdict_of
from tests.lifecycle.stack import Stack, make_model, until


def add_hub_model(stack: Stack, name: str) -> Path:
    """A model of the catalogue that only a hub has; returns where a host keeps it once it is fetched."""
    config = json.loads((stack.home / "tiny" / "config.json").read_text())
    lines = [f"{key} = {json.dumps(value)}" for key, value in config.items()]
    head = [f"[models.{name}]", 'source = "hub"', f'repository = "example/{name}"', f'revision = "{"0" * 40}"']
    with (stack.home / "models.toml").open("a") as file:
        file.write("\n".join(["", *head, f"[models.{name}.config]", *lines, ""]))
    return local_folder(load_catalogue(stack.settings).entry(name), cache=stack.settings.cache)


def test_without_its_hub_a_job_waits_and_starts_once_its_model_lies_there_while_others_go_on(stack: Stack) -> None:
    near, far = add_hub_model(stack, "near"), add_hub_model(stack, "far")
    make_model(near)
    stack.start_worker(HF_HUB_OFFLINE="1")  # no hub can be reached from this host
    stack.start_janitor()

    waits = stack.submit("steps=2", model="far")
    goes_on = stack.submit("steps=2", model="near")
    refused = until(lambda: fetched(stack, "far").error, seconds=60, what="a fetch that could not reach its hub")

    assert stack.wait(goes_on, seconds=60).status == "succeeded"
    verdict = blocked(stack, waits)
    assert (verdict.blocked_by, stack.attempts(waits)) == ("BASE_MODEL_FETCHING", [])
    assert refused.rstrip(".") in verdict.detail
    assert "python -m worker.base_models far" in verdict.detail
    assert list(far.parent.glob("*.fetch")) == []

    make_model(far.with_name("arriving"))
    far.with_name("arriving").rename(far)  # whole at once, as `python -m worker.base_models far` puts it there
    assert stack.wait(waits, seconds=60).status == "succeeded"
    assert [row.outcome for row in stack.attempts(waits)] == ["succeeded"]
    assert stack.broken_invariants() == []


def fetched(stack: Stack, model: str) -> FetchRow:
    def row() -> FetchRow | None:
        with Session(stack.engine) as session:
            return session.scalars(select(FetchRow).where(FetchRow.model == model)).one_or_none()

    found: FetchRow = until(row, what=f"a fetch of {model}")
    return found


def blocked(stack: Stack, job_id: str) -> Verdict:
    with Session(stack.engine) as session:
        found = verdict_of(session, job_id, pool_name=stack.settings.pool)
    assert found is not None
    return found
