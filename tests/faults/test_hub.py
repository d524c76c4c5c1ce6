"""The source of base models is away (fault 62)."""

from __future__ import annotations

import json
from pathlib import Path

from shared.settle.catalogue import load_catalogue, local_folder
from tests.lifecycle.stack import Stack, make_model, until


def add_hub_model(stack: Stack, name: str) -> Path:
    """A model of the catalogue that only a hub has; returns where a host keeps it once it is fetched."""
    config = json.loads((stack.home / "tiny" / "config.json").read_text())
    lines = [f"{key} = {json.dumps(value)}" for key, value in config.items()]
    head = [f"[models.{name}]", 'source = "hub"', f'repository = "example/{name}"', f'revision = "{"0" * 40}"']
    with (stack.home / "models.toml").open("a") as file:
        file.write("\n".join(["", *head, f"[models.{name}.config]", *lines, ""]))
    return local_folder(load_catalogue(stack.settings).entry(name), cache=stack.settings.cache)


def test_without_its_hub_a_job_is_tried_again_and_ends_by_name_while_cached_models_go_on(stack: Stack) -> None:
    near, far = add_hub_model(stack, "near"), add_hub_model(stack, "far")
    make_model(near)
    stack.start_worker(HF_HUB_OFFLINE="1", TUNEPOOL_MAX_ATTEMPTS="2")  # no hub can be reached from this host
    stack.start_janitor()

    lost = stack.submit("steps=2", model="far")
    failed = stack.wait(lost, seconds=60)

    assert stack.wait(stack.submit("steps=2", model="near"), seconds=60).status == "succeeded"
    assert (failed.status, failed.error["code"]) == ("failed", "base_model_unavailable")
    assert "python -m worker.base_models far" in failed.error["message"]
    assert [row.outcome for row in stack.attempts(lost)] == ["crashed", "crashed"]
    assert list(far.parent.glob("*.fetch")) == []
    assert stack.broken_invariants() == []


def test_a_job_whose_model_arrives_between_two_attempts_succeeds(stack: Stack) -> None:
    far = add_hub_model(stack, "far")
    # More attempts than it needs: how many pass before the model lies there depends on the machine.
    stack.start_worker(HF_HUB_OFFLINE="1", TUNEPOOL_MAX_ATTEMPTS="50")
    stack.start_janitor()

    job = stack.submit("steps=2", model="far")
    until(lambda: stack.job(job).failures >= 1, what="a first attempt that failed")
    make_model(far.with_name("arriving"))
    far.with_name("arriving").rename(far)  # whole at once, as `python -m worker.base_models far` puts it there

    assert stack.wait(job, seconds=60).status == "succeeded"
    *failed, last = [row.outcome for row in stack.attempts(job)]
    assert (set(failed), last) == ({"crashed"}, "succeeded")
    assert stack.broken_invariants() == []
