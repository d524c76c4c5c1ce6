"""Brings points to Weights & Biases by its library: `python -m worker.chores.wandb_program`.

One JSON object comes on standard input and one goes to standard output. The run's id is the job's, so a later program
goes on with the run of an earlier one. The server knows the last step that it has, and the library leaves out all
steps up to that one. So nothing is sent twice after a program has died.
"""

from __future__ import annotations

from typing import Any

import wandb
from wandb.errors import Error

from worker.chores.library_answer import answer_once

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


def answered(wanted: dict[str, Any]) -> dict[str, Any]:
    """The address of the run, or the first line of the library's error, without the key."""
    try:
        return feed(wanted)
    except Error as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        return {"error": words[0].replace(wanted["api_key"], "…")}


if __name__ == "__main__":
    answer_once(answered)
