"""Looks up what a hub or a folder has: the commit of a branch or a tag, config.json, and the headers of the weights.

Of a hub nothing but these and the tokenizer is fetched: headers come by requests for a range of bytes. A program of the
trainer then tells what the template writes and how the model is built.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog
from pydantic import ValidationError

from shared.chores import base_models as look_ups
from shared.chores.base_models import LOOK_UP, LookUp
from shared.contract.model_description import DescriptionSpec, ModelDescription
from shared.errors import Invalid
from shared.settle.model_facts import facts_of, weights_of
from shared.settle.plain_models import read_config
from shared.settle.weights import Tensors, Weights, parsed, tensors_in
from worker.base_models import (
    GATED,
    HUB_REFUSALS,
    KNOWS,
    UNKNOWN,
    BaseModelUnavailable,
    is_known,
    refused_by_hub,
    run_step,
    verify,
)
from worker.chores import run_program as programs
from worker.chores.run_program import LeaseWatch, TooSlow, under_lease
from worker.host.host import Host
from worker.program import hostile_folder, workdir
from worker.program.workdir import Workdir

log = structlog.get_logger()

_SECONDS: Final = 300.0  # for a few small answers of the hub, and the start of transformers
_ANSWER_SECONDS: Final = 30.0  # for its first answer; the hub's client would wait for ever
_CONFIG_BYTES: Final = 2**20
_TENSORS_BYTES: Final = 2**27
_FILE_BYTES: Final = 2**27  # the largest tokenizers and indexes of weights have some 40 MB
_NO_WEIGHTS, _NO_HEADERS, _NO_HUB, _TOO_LARGE = 46, 47, 49, 50
_MOST_FILES: Final = 2000  # of weights; the largest models that are published have some hundred
_TOKENIZER: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_DESCRIPTION_BYTES: Final = 2**20
_INDEX: Final = "model.safetensors.index.json"
# A process of its own has the hub's token, can be ended, and may load transformers. Its refusals are those of the
# fetcher (worker/base_models.py), and more: the architecture is not known here, no safetensors, no header in them.
_HUB_PROGRAM: Final = f"""
{KNOWS}
import errno, re, resource
from concurrent.futures import ThreadPoolExecutor
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, SafetensorsParsingError
repository, revision, folder, most = *sys.argv[1:4], int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))  # whatever the hub says of sizes, if it says any

def fetched(name):
    if (there.get(name) or 0) > most:
        sys.exit({_TOO_LARGE})
    return pathlib.Path(hf_hub_download(repository, name, revision=commit, local_dir=folder))

try:
    try:
        info = HfApi().model_info(repository, revision=revision, timeout={_ANSWER_SECONDS}, files_metadata=True)
        commit, there = info.sha, {{one.rfilename: one.size for one in info.siblings or ()}}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # a page, or JSON of no repository
        sys.exit({_NO_HUB})
    if not re.fullmatch("[0-9a-f]{{40}}", commit or ""):  # it will be a part of a folder's name
        sys.exit({_NO_HUB})
    file = fetched("config.json")
    pathlib.Path(folder, "commit").write_text(commit)
    if file.stat().st_size > {_CONFIG_BYTES}:
        sys.exit(0)  # whoever reads it refuses it
    if not known(file):
        sys.exit({UNKNOWN})
    for name in {sorted(_TOKENIZER)}:
        if name in there:
            fetched(name)
    names = {{"model.safetensors"}} & there.keys()
    if not names and "{_INDEX}" in there:
        index = fetched("{_INDEX}")
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) & there.keys()
        except (ValueError, RecursionError):
            sys.exit({_NO_HEADERS})
    if not names:
        sys.exit({_NO_WEIGHTS})
    if len(names) > {_MOST_FILES}:
        sys.exit({_NO_HEADERS})
    read = lambda name: HfApi().parse_safetensors_file_metadata(repository, name, revision=commit)
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(read, sorted(names)))
    tensors = {{name: [one.dtype, one.shape] for file in files for name, one in file.tensors.items()}}
    pathlib.Path(folder, "tensors").write_text(json.dumps(tensors))
except (SafetensorsParsingError, KeyError, TypeError, AttributeError):  # what is published; the line has other errors
    sys.exit({_NO_HEADERS})
except Exception as error:
    if getattr(error, "errno", None) == errno.EFBIG:
        sys.exit({_TOO_LARGE})
    cause = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    if cause is None or cause.response is None or cause.response.status_code not in (401, 403, 404):
        raise
    sys.exit({GATED} if isinstance(cause, GatedRepoError) else cause.response.status_code - 360)
"""


class NoHub(BaseModelUnavailable):
    """Something answers at the hub's address, and is none; its message is for users."""


@dataclass(frozen=True, slots=True)
class LookUpResult:
    """What a look has found: the commit (of a folder there is none), config.json as it is used, and the weights."""

    commit: str | None
    config: str
    weights: Weights


def look_up_next(host: Host) -> bool:
    """Look up one base model that was asked for, if any waits. False: none does, or the worker drains."""
    claim = partial(look_ups.claim, worker_id=host.worker.id, lease_seconds=host.settings.lease_seconds)
    wanted = host.claim(claim)
    return wanted is not None and under_lease(host, LOOK_UP, wanted.lease, partial(_look_up, host, wanted))


def _look_up(host: Host, wanted: LookUp, watch: LeaseWatch) -> None:
    lease, place = wanted.lease, workdir.make(host.work, wanted.lease)
    look = _in_folder if wanted.source == "path" else _at_hub
    try:
        seen = look(wanted, place.data, _impatient(watch))
    except Invalid as error:
        sentence = error.message
        host.write_in_the_end(lambda s: look_ups.refused(s, lease, error=sentence, known=wanted.known))
        log.warning("base_model.refused", locator=wanted.locator, revision=wanted.revision, reason=sentence)
    except BaseModelUnavailable as error:
        reason = error.message
        sentence = reason if isinstance(error, NoHub) else _away(wanted)
        host.write_in_the_end(lambda s: look_ups.unheard(s, lease, error=sentence))
        log.warning("base_model.unheard", locator=wanted.locator, revision=wanted.revision, reason=reason)
    else:
        weights, description = seen.weights.model_dump(), _described(host, wanted, seen, place, watch)
        host.write_in_the_end(
            lambda s: look_ups.resolved(
                s, lease, commit=seen.commit, config=seen.config, weights=weights, description=description
            )
        )
        log.info("base_model.ready", locator=wanted.locator, revision=wanted.revision, commit=seen.commit)


def _described(
    host: Host, wanted: LookUp, seen: LookUpResult, place: Workdir, watch: LeaseWatch
) -> dict[str, Any] | None:
    """What a program of the trainer tells of the model; None when it does not. The model is usable without.

    Raises Stopped.
    """
    if not host.settings.describer:
        return None
    folder = Path(wanted.locator) if wanted.source == "path" else place.data
    if wanted.source == "hub":
        (folder / "config.json").write_text(seen.config, encoding="utf-8")  # without names of code
    place.spec.write_text(DescriptionSpec(folder=str(folder)).model_dump_json(), encoding="utf-8")
    workdir.hand_over(place, uid=host.trainer_uid)
    run = partial(programs.run, host, host.settings.describer, lease=wanted.lease, place=place, watch=watch)
    try:
        ended = run(seconds=_SECONDS, reads=(folder,))
        content = hostile_folder.read(place.out, "description.json", most=_DESCRIPTION_BYTES)
        made = ModelDescription.model_validate_json(content)
    except (TooSlow, OSError, hostile_folder.Refused, ValidationError) as error:
        log.warning("base_model.undescribed", locator=wanted.locator, reason=str(error)[:200])
        return None
    log.info("base_model.described", locator=wanted.locator, exit=ended.code)
    return _compared(made, seen.weights).model_dump(mode="json")


def _compared(made: ModelDescription, weights: Weights) -> ModelDescription:
    """The description, with what the headers of the weights say otherwise."""
    if made.build is None or made.build.parameters == weights.parameters:
        return made
    note = (
        f"Its files hold {weights.parameters:,} parameters, and the model that transformers builds from its config has "
        f"{made.build.parameters:,}: parts that are not trained, or a packed form. Memory is reckoned from the files."
    )
    return made.model_copy(update={"notes": [*made.notes, note]})


def _impatient(watch: LeaseWatch) -> Callable[[], None]:
    """Keeps the lease, and raises BaseModelUnavailable when the look-up takes too long."""
    began = time.monotonic()

    def check() -> None:
        watch.check()
        if time.monotonic() - began > _SECONDS:
            raise BaseModelUnavailable(f"The look-up took more than {_SECONDS:g} seconds.")

    return check


def _at_hub(wanted: LookUp, place: Path, interrupt: Callable[[], None]) -> LookUpResult:
    """Raises Invalid, BaseModelUnavailable, Stopped."""
    asked = f"{wanted.locator} at revision {wanted.revision}"
    argv = [sys.executable, "-c", _HUB_PROGRAM, wanted.locator, wanted.revision, str(place), str(_FILE_BYTES)]
    answers = HUB_REFUSALS | {UNKNOWN, _NO_WEIGHTS, _NO_HEADERS, _NO_HUB, _TOO_LARGE}
    ended = run_step(argv, interrupt, what=f"look-up of {asked}", answers=answers)
    if ended == _NO_HUB:
        raise NoHub(
            f"What answers the workers as the hub says nothing of {asked}: a page of a proxy, perhaps, or no hub. Ask "
            "your administrator to look at HF_ENDPOINT and the proxy of the workers. It is asked again."
        )
    if ended == _TOO_LARGE:
        raise Invalid(
            f"A file of {asked} that tells what the model is (config.json, a tokenizer's, the index of its weights) is "
            f"larger than {_FILE_BYTES} bytes. No model needs that: use another revision."
        )
    if ended in HUB_REFUSALS:
        raise refused_by_hub(wanted.name, f"config.json of {asked}", ended)
    config = _config(place / "config.json", asked, known=ended != UNKNOWN)
    if ended == _NO_WEIGHTS:
        raise _no_weights(asked)
    if ended == _NO_HEADERS:
        raise Invalid(
            f"A safetensors file of {asked} has a header that describes no tensors, or is larger than any model's, or "
            f"there are more than {_MOST_FILES} such files. Use another revision."
        )
    commit = (place / "commit").read_text(encoding="ascii")
    return _seen(wanted, commit, config, _read_tensors(place / "tensors", asked))


def _in_folder(wanted: LookUp, place: Path, interrupt: Callable[[], None]) -> LookUpResult:
    """Raises Invalid, BaseModelUnavailable, Stopped."""
    folder = Path(wanted.locator)
    asked = f"the folder {wanted.locator}"
    file = folder / "config.json"
    try:
        if not folder.is_dir():
            raise Invalid(
                f"There is no folder {wanted.locator} on the worker that looked for it. Put the model there, at the "
                f"same place on every worker's host, and look again: tunepool models check {wanted.name}"
            )
        if not file.is_file():
            raise Invalid(f"There is no config.json in {asked}. Put the model's files there as they were published.")
        small = file.stat().st_size <= _CONFIG_BYTES
        config = _config(file, asked, known=small and is_known(file, interrupt))
        tensors = tensors_in(folder)
        if tensors is None:
            raise _no_weights(asked)
        verify(folder)
    except OSError as error:
        raise Invalid(
            f"The worker cannot read {asked}: {error.strerror}. Give its user the right to read all of it."
        ) from error
    return _seen(wanted, None, config, tensors)


def _no_weights(asked: str) -> Invalid:
    return Invalid(
        f"There are no weights as safetensors in {asked} (model.safetensors, or several files and "
        "model.safetensors.index.json). Other formats may run code when they are read: use a revision or a copy of the "
        "model that is saved as safetensors."
    )


def _config(file: Path, asked: str, *, known: bool) -> str:
    """A config.json that facts can be derived from, without names of code. Raises Invalid."""
    if file.stat().st_size > _CONFIG_BYTES:
        raise Invalid(f"Its config.json is larger than {_CONFIG_BYTES} bytes.")
    try:
        config = read_config(file, known=known)
    except Invalid as error:
        if known:
            raise
        raise Invalid(f"{error.message} transformers does not know {asked} without it: use another model.") from error
    if not known:
        raise Invalid(
            f"The architecture of {asked} (model_type '{str(config['model_type'])[:100]}') is not known to this "
            "installation's transformers. A newer version of Tunepool may know it."
        )
    return json.dumps(config)


def _read_tensors(file: Path, asked: str) -> Tensors:
    if file.stat().st_size > _TENSORS_BYTES:
        raise Invalid(f"The headers of the weights of {asked} are larger than {_TENSORS_BYTES} bytes.")
    listed: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return parsed({name: {"dtype": kind, "shape": shape} for name, (kind, shape) in listed.items()})


def _seen(wanted: LookUp, commit: str | None, config: str, tensors: Tensors) -> LookUpResult:
    """Raises Invalid when the numbers of config.json or of the headers are none of a model."""
    document = json.loads(config)
    weights = weights_of(document, tensors, name=wanted.name)
    facts_of(document, name=wanted.name, weights=weights)
    return LookUpResult(commit, config, weights)


def _away(wanted: LookUp) -> str:
    """For users: no address, no path."""
    if wanted.source == "path":
        return "The look at its folder took too long, and is begun again."
    return (
        f"The hub has not answered for {wanted.locator} yet, and is asked again. A host without a way to the hub names "
        "a folder that has the model (source = 'path')."
    )
