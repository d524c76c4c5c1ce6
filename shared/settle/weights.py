"""Reads the headers of a model's safetensors files: its number of parameters, its experts, the type of its weights.

A header lists each tensor with its type and shape (https://huggingface.co/docs/safetensors): no weight is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from shared.contract.part import Part
from shared.errors import Invalid

Tensors = Mapping[str, tuple[str, Sequence[int]]]  # name -> (type as the format writes it, shape)

_HEADER_BYTES: Final = 100_000_000  # the format's own limit
_MOST: Final = 10**14  # parameters; arithmetic with more only does harm
_INDEX: Final = "model.safetensors.index.json"
# Beside the weights: scales and other helps of a quantised form. They are no parameters of the model.
_BESIDE: Final = re.compile(
    r"(_scales?|_scale_inv|_scale_2|\.scales|\.qzeros|\.g_idx|absmax|quant_map|weight_shape|weight_zero_point)$"
    r"|\.quant_state\."
)
_PACKED: Final = re.compile(
    r"(\.qweight|\.weight_packed)$"
)  # GPTQ, AWQ, compressed-tensors: several values in an int32
_EXPERT: Final = re.compile(r"\.experts\.|\.block_sparse_moe\.(input|output)_linear\.")
_HEAD: Final = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
# Layers that predict further tokens. transformers does not load them.
_FURTHER: Final = re.compile(r"^mtp\.")
_LAYER: Final = re.compile(r"^(?:model\.|language_model\.)*layers\.(\d+)\.")
_TYPES: Final = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8",
    "F8_E5M2": "float8",
}


class Weights(Part):
    """Counts over all tensors that transformers loads."""

    parameters: int
    expert_parameters: int = 0  # of the experts that a router chooses among
    head_parameters: int = 0  # of an output layer that is stored by itself
    dtype: str  # of most parameters: a type of torch, or the name of a quantised form


def weigh(tensors: Tensors, *, config: Mapping[str, Any], layers: int) -> Weights:
    """Count what a header lists.

    Args:
        tensors: of all files of the model.
        config: its config.json, which says how it is quantised.
        layers: `num_hidden_layers`; layers behind them are not loaded.

    Raises:
        Invalid: the tensors have no sizes of a model.
    """
    counts = {name: _count(name, *tensor, config=config) for name, tensor in tensors.items() if _loaded(name, layers)}
    total = sum(counts.values())
    if not 0 < total <= _MOST:
        raise Invalid(f"The headers of its weights describe {total} parameters, which is no size of a model.")
    by_type: dict[str, int] = {}
    for name, count in counts.items():
        kind = _type(name, tensors[name][0], config=config)
        by_type[kind] = by_type.get(kind, 0) + count
    return Weights(
        parameters=total,
        expert_parameters=sum(count for name, count in counts.items() if _EXPERT.search(name)),
        head_parameters=sum(count for name, count in counts.items() if _HEAD.search(name)),
        dtype=max(by_type, key=by_type.__getitem__),
    )


def _loaded(name: str, layers: int) -> bool:
    layer = _LAYER.match(name)
    return not (_BESIDE.search(name) or _FURTHER.match(name) or (layer and int(layer[1]) >= layers))


def _count(name: str, kind: str, shape: Sequence[int], *, config: Mapping[str, Any]) -> int:
    if not all(type(size) is int and 0 <= size <= _MOST for size in shape):
        raise Invalid(f"The header of its weights gives '{name[:100]}' a shape that is none.")
    return math.prod(shape) * _values_each(name, kind, _quantised(config))


def _values_each(name: str, kind: str, quantised: Mapping[str, Any]) -> int:
    """How many parameters one stored number holds."""
    if kind == "I32" and _PACKED.search(name):
        bits = quantised.get("bits")
        return 32 // bits if type(bits) is int and bits in (2, 4, 8) else 8
    # MXFP4 blocks, NVFP4 and bitsandbytes' 4 bit: two in a byte. 8-bit forms are stored as I8 or F8.
    return 2 if kind == "U8" and quantised else 1


def _type(name: str, kind: str, *, config: Mapping[str, Any]) -> str:
    quantised = _quantised(config)
    if _values_each(name, kind, quantised) > 1:
        return str(quantised.get("quant_method") or kind)[:40]
    return _TYPES.get(kind, kind[:40])


def _quantised(config: Mapping[str, Any]) -> Mapping[str, Any]:
    declared = config.get("quantization_config")
    return declared if isinstance(declared, Mapping) else {}


def tensors_in(folder: Path) -> dict[str, tuple[str, list[int]]] | None:
    """What the headers of a model's folder list; None where there are no safetensors files. Raises Invalid, OSError."""
    files = _files(folder)
    listed: dict[str, tuple[str, list[int]]] = {}
    for file in files:
        listed |= _listed(file)
    return listed if files else None


def _files(folder: Path) -> list[Path]:
    """The files that transformers would load: those of the index, else the only one."""
    index = folder / _INDEX
    if not index.is_file():
        only = folder / "model.safetensors"
        return [only] if only.is_file() else []
    try:
        names = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Invalid(f"{_INDEX} has no weight_map of file names.") from error
    missing = sorted(name for name in names if "/" in name or "\0" in name or not (folder / name).is_file())
    if missing:
        raise Invalid(f"{_INDEX} names {missing[0][:100]}, which is not there.")
    return [folder / name for name in sorted(names)]


def _listed(file: Path) -> dict[str, tuple[str, list[int]]]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= _HEADER_BYTES:
            raise Invalid(f"{file.name} has a header of impossible length.")
        header = stream.read(length)
    try:
        return parsed(json.loads(header))
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{file.name} has a header that describes no tensors.") from error


def parsed(header: Any) -> dict[str, tuple[str, list[int]]]:
    """A header as tensors. Raises ValueError when it is none."""
    try:
        return {
            str(name): (str(entry["dtype"]), list(entry["shape"]))
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("no tensors") from error
