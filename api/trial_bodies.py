"""The trials of a sweep, each read by the code that reads the body of a submit."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from api.body import parse
from shared.chores.sweeps import NewTrial, with_words_of
from shared.contract.job_request import CreateJob
from shared.contract.sweep import CreateSweep
from shared.settle import sweep_trials


def trials_of(wanted: CreateSweep, sweep_id: str) -> list[NewTrial]:
    """Raises Invalid, which names the trial and the field."""
    sweep_trials.check(wanted)
    return [
        NewTrial(chosen, with_words_of(number, chosen, partial(_request, wanted, sweep_id, number, chosen)))
        for number, chosen in enumerate(sweep_trials.settings(wanted))
    ]


def _request(wanted: CreateSweep, sweep_id: str, number: int, chosen: dict[str, Any]) -> CreateJob:
    body = sweep_trials.body(wanted, sweep_id, number, chosen)
    return parse(json.dumps(body).encode(), CreateJob)
