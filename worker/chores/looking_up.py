"""Looks up what a hub has: the commit of a branch or a tag, and its config.json. No weights are fetched."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from shared.chores import base_models as look_ups
from shared.chores.base_models import LOOK_UP, LookUp
from shared.errors import Invalid
from shared.settle.model_facts import facts_of
from worker.base_models import HUB_REFUSALS, BaseModelUnavailable, refused_by_hub, run_step, verify_json
from worker.chores.run_program import Watch, under_lease
from worker.host.host import Host
from worker.program import workdir

log = structlog.get_logger()

_SECONDS: Final = 300.0  # for two small answers of the hub, and the start of transformers
_CONFIG_BYTES: Final = 2**20
_UNKNOWN: Final = 45
# A process of its own has the hub's token, can be ended, and may load transformers. Its refusals are those of the
# fetcher (worker/base_models.py), and one more: the architecture is not known here.
_PROGRAM: Final = f"""
import json, pathlib, sys
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
repository, revision, folder = sys.argv[1:]
try:
    commit = HfApi().model_info(repository, revision=revision).sha
    file = hf_hub_download(repository, "config.json", revision=commit, local_dir=folder)
except Exception as error:
    cause = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    if cause is None or cause.response is None or cause.response.status_code not in (401, 403, 404):
        raise
    sys.exit(cause.response.status_code - 360)
pathlib.Path(folder, "commit").write_text(commit)
if pathlib.Path(file).stat().st_size > {_CONFIG_BYTES}:
    sys.exit(0)  # whoever reads it refuses it
try:
    kind = json.loads(pathlib.Path(file).read_text(encoding="utf-8"))["model_type"]
except (ValueError, KeyError, TypeError, RecursionError):
    sys.exit(0)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
sys.exit(0 if kind in list(CONFIG_MAPPING_NAMES) else {_UNKNOWN})
"""


def look_up_next(host: Host) -> bool:
    """Look up one base model that was asked for, if any waits. False: none does, or the worker drains."""
    claim = partial(look_ups.claim, worker_id=host.worker.id, lease_seconds=host.settings.lease_seconds)
    wanted = host.claim(claim)
    return wanted is not None and under_lease(host, LOOK_UP, wanted.lease, partial(_look_up, host, wanted))


def _look_up(host: Host, wanted: LookUp, watch: Watch) -> None:
    lease, place = wanted.lease, workdir.make(host.work, wanted.lease).data
    try:
        commit, config = _found(wanted, place, _impatient(watch))
    except Invalid as error:
        sentence = error.message
        host.write_in_the_end(lambda s: look_ups.refused(s, lease, error=sentence))
        log.warning("base_model.refused", locator=wanted.locator, revision=wanted.revision, reason=sentence)
    except BaseModelUnavailable as error:
        reason = error.message
        host.write_in_the_end(lambda s: look_ups.unheard(s, lease, error=_away(wanted)))
        log.warning("base_model.unheard", locator=wanted.locator, revision=wanted.revision, reason=reason)
    else:
        host.write_in_the_end(lambda s: look_ups.found(s, lease, commit=commit, config=config))
        log.info("base_model.ready", locator=wanted.locator, revision=wanted.revision, commit=commit)


def _impatient(watch: Watch) -> Callable[[], None]:
    """Keeps the lease, and raises BaseModelUnavailable when the look-up takes too long."""
    began = time.monotonic()

    def check() -> None:
        watch.check()
        if time.monotonic() - began > _SECONDS:
            raise BaseModelUnavailable(f"The hub took more than {_SECONDS:g} seconds.")

    return check


def _found(wanted: LookUp, place: Path, interrupt: Callable[[], None]) -> tuple[str, str]:
    """The commit, and config.json as it was published. Raises Invalid, BaseModelUnavailable, Stopped."""
    asked = f"{wanted.locator} at revision {wanted.revision}"
    argv = [sys.executable, "-c", _PROGRAM, wanted.locator, wanted.revision, str(place)]
    ended = run_step(argv, interrupt, what=f"look-up of {asked}", answers=HUB_REFUSALS | {_UNKNOWN})
    if ended in HUB_REFUSALS:
        raise refused_by_hub(wanted.name, f"config.json of {asked}", ended)
    config = _read(place / "config.json", name=wanted.name)
    if ended == _UNKNOWN:
        kind = json.loads(config)["model_type"]
        raise Invalid(
            f"The architecture of {asked} (model_type '{str(kind)[:100]}') is not known to this installation's "
            "transformers. A newer version of Tunepool may know it."
        )
    return (place / "commit").read_text(encoding="ascii"), config


def _read(file: Path, *, name: str) -> str:
    """A config.json that facts can be reckoned from, and that names no code. Raises Invalid."""
    if file.stat().st_size > _CONFIG_BYTES:
        raise Invalid(f"Its config.json is larger than {_CONFIG_BYTES} bytes.")
    verify_json(file)
    text = file.read_text(encoding="utf-8")
    facts_of(json.loads(text), name=name)
    return text


def _away(wanted: LookUp) -> str:
    """For users: no address, no path."""
    return (
        f"The hub has not answered for {wanted.locator} yet, and is asked again. A host without a way to the hub names "
        "a folder that has the model (source = 'path')."
    )
