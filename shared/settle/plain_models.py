"""What a base model's folder may hold: plain data. All of it comes from strangers, and none of it is run.

Safetensors, JSON and tokenizer files only; nothing that could carry code, in no key of a config either.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from shared.errors import Invalid

# Formats that run code when they are read, and code itself.
_DANGEROUS: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".py", ".msgpack", ".h5", ".so"})
# Names code of the repository to import. Where transformers knows the model itself, it is left out of our copy.
_OWN_CODE: Final = "auto_map"
# `_attn_implementation_internal` names a repository of kernels (CVE-2026-4372).
_CODE_KEYS: Final = frozenset({_OWN_CODE, "_attn_implementation_internal", "_experts_implementation_internal"})
# These choose an implementation by name; transformers takes a name with a slash for a repository of kernels.
_KERNEL_KEYS: Final = frozenset({"_attn_implementation", "attn_implementation", "_experts_implementation"})
_JSON_BYTES: Final = 64 * 1024 * 1024  # the largest tokenizer.json in use has a third of it
# Sizes that memory estimates use; above this nothing fits anywhere, and arithmetic with it only does harm.
_SIZES: Final = frozenset(
    {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size", "n_embd", "n_layer"}
)
_LARGEST_SIZE: Final = 10_000_000


def must_be_plain(folder: Path, *, weights: bool = True) -> None:
    """Refuse a model that is not plain data; without `weights`, what stands beside them. Raises Invalid."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in files:
        _verify_place(file, folder)
    bad = sorted(file.name for file in files if file.suffix in _DANGEROUS)
    if bad:
        raise _refusal(
            f"{bad[0]} can run code when it is read; only safetensors, JSON and tokenizer files are accepted."
        )
    if weights and not any(file.suffix == ".safetensors" for file in files):
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


def read_config(file: Path, *, known: bool) -> dict[str, Any]:
    """A config without the names of its repository's code, which is never run.

    Args:
        known: transformers has the model's architecture itself, and needs no such code.

    Raises:
        Invalid: it is no JSON object, names code that would be needed or kernels, or has sizes of no model.
    """
    config = _read_json(file)
    if isinstance(config, dict) and known:
        config = without_code(config)
    _verify_config(config, file)
    made: dict[str, Any] = config
    return made


def without_code(config: dict[str, Any]) -> dict[str, Any]:
    """A config, and the configs of its parts, without `auto_map`."""
    return {
        key: without_code(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in config.items()
        if key != _OWN_CODE
    }


def naming_code(folder: Path) -> list[Path]:
    """The configs of a model's folder that `without_code` would change. Raises Invalid for what is no JSON."""
    files = [file for file in sorted(folder.glob("*config.json")) if file.is_file() and not file.is_symlink()]
    configs = {file: _read_json(file) for file in files}
    return [file for file, config in configs.items() if isinstance(config, dict) and without_code(config) != config]


def leave_code_out(folder: Path) -> None:
    """Rewrite the configs of our own copy of a model that transformers knows itself.

    A tokenizer without tokenizer.json may need its code: its config is left as it is, and refused.
    """
    for file in naming_code(folder):
        if file.name != "tokenizer_config.json" or (folder / "tokenizer.json").is_file():
            file.write_text(json.dumps(without_code(_read_json(file)), indent=2), encoding="utf-8")


def _verify_config(config: Any, file: Path) -> None:
    """No key, at any depth that a model nests its parts in, may name code or a repository of it."""
    if not isinstance(config, dict):
        raise _refusal(f"{file.name} is not a JSON object.")
    code_keys = _CODE_KEYS.intersection(config)
    if code_keys:
        raise _refusal(f"{file.name} has the key '{min(code_keys)}', which names code to run. It is never run.")
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
