"""Brings points to Weights & Biases by its library: `python -m worker.chores.wandb_program`.

One JSON object comes on standard input and one goes to standard output. The run's id is the job's, so a later program
goes on with the run of an earlier one. The server knows the last step that it has: the library leaves out what a
program that died had brought there already.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import wandb
from wandb.errors import Error

from shared.operating.secrecy import hide_secrets

INIT_SECONDS = 30.0


def feed(wanted: dict[str, Any]) -> dict[str, Any]:
    """Log the points, and end the run if the job has ended. Raises wandb's Error."""
    ending = wanted["ending"]
    settings = wandb.Settings(
        base_url=wanted["base_url"],
        api_key=wanted["api_key"],
        init_timeout=INIT_SECONDS,
        console="off",
        silent=True,
        # Of this host and of this installation it needs to know nothing.
        disable_git=True,
        disable_code=True,
        disable_job_creation=True,
        save_code=False,
        host="tunepool",
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        # Between two programs the run goes on.
        x_update_finish_state=ending is not None,
    )
    run = wandb.init(
        project=wanted["project"],
        entity=wanted["entity"],
        name=wanted["name"],
        tags=wanted["tags"],
        id=wanted["run_id"],
        config=wanted["config"],
        resume="allow",
        dir=wanted["scratch"],
        settings=settings,
    )
    for step, at, figures in wanted["points"]:
        run.log({**figures, "_timestamp": at}, step=step)
    if ending is not None:
        run.summary.update(ending)
    url = run.url
    run.finish(exit_code=0 if ending is None or ending["status"] == "succeeded" else 1)
    return {"url": url}


def main() -> None:
    hide_secrets()
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the library prints is no answer
    wanted = json.load(sys.stdin)
    try:
        document = feed(wanted)
    except Error as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        document = {"error": words[0].replace(wanted["api_key"], "…")}
    with answer:
        json.dump(document, answer)


if __name__ == "__main__":
    main()
