"""Weights as tensors of a GGUF file: names, the order of attention rows, number formats; written one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import gguf
import libgguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize

from shared.contract.gguf_formats import GgufQuantization
from shared.errors import Invalid
from worker.train.gguf_mix import q4_k_m

KINDS: Final[dict[GgufQuantization, Kind]] = {
    "f32": Kind.F32,
    "f16": Kind.F16,
    "bf16": Kind.BF16,
    "q8_0": Kind.Q8_0,
    "q5_0": Kind.Q5_0,
    "q4_0": Kind.Q4_0,
    "q4_k_m": Kind.Q4_K,
}
FILE_TYPES: Final[dict[GgufQuantization, gguf.LlamaFileType]] = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M,
}
_K_KINDS: Final = frozenset({Kind.Q4_K, Kind.Q6_K})  # read by the gguf package, and written by libgguf
# llama.cpp turns neighbouring pairs where transformers turns the two halves of a head.
_TURNED: Final = frozenset({"llama", "granite"})
_QUERY, _KEY = re.compile(r"\.q_proj\.(weight|bias)$"), re.compile(r"\.k_proj\.(weight|bias)$")
# Every token passes through these two, so five or four bits are too few for them.
_WIDE: Final = ("token_embd.weight", "output.weight")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor to write: its name, its shape, and its values, float32, when its turn comes."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], np.ndarray[Any, Any]]


class Names:
    """From transformers' names to llama.cpp's, by the table of the gguf package."""

    def __init__(self, config: Any, architecture: str) -> None:
        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        self._names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        self._turned = architecture in _TURNED
        self._heads, self._key_heads = config.num_attention_heads, config.num_key_value_heads

    def of(self, name: str) -> str:
        """Raises Invalid: `architecture_not_exported`, a tensor that llama.cpp has no place for."""
        known = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise Invalid(
                f"llama.cpp has no place for the tensor {name} in a model of this architecture.",
                code="architecture_not_exported",
                param="adapter",
            )
        return str(known)

    def in_order(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """The rows of a tensor, `[out, …]`, as llama.cpp expects them."""
        if self._turned and _QUERY.search(name):
            return _turn(rows, self._heads)
        if self._turned and _KEY.search(name):
            return _turn(rows, self._key_heads)
        return rows


def _turn(rows: torch.Tensor, heads: int) -> torch.Tensor:
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def pieces_of(model: Any, names: Names) -> Iterator[GgufTensor]:
    """Every weight of a transformers model, tied ones once."""
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            yield GgufTensor(names.of(name), tuple(tensor.shape), _reading(names, name, tensor))


def _reading(names: Names, name: str, tensor: torch.Tensor) -> Callable[[], np.ndarray[Any, Any]]:
    return lambda: in_numpy(names.in_order(name, tensor))


def in_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(tensor.detach().to(torch.float32).numpy())


def write_tensors(writer: gguf.GGUFWriter, pieces: list[GgufTensor], quantization: GgufQuantization) -> None:
    """Write header, metadata and tensors, and close the file. One tensor at a time is in memory a second time.

    Raises:
        Invalid: `quantization_too_narrow`, a weight is larger than f16 can say.
    """
    kinds = _kinds(pieces, quantization)
    for piece, kind in zip(pieces, kinds, strict=True):
        size = gguf.quant_shape_to_byte_shape(piece.shape, kind)
        # The shape is given in numbers, and numpy's type says so.
        writer.add_tensor_info(piece.name, piece.shape, np.dtype(np.float32), int(np.prod(size)), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for piece, kind in zip(pieces, kinds, strict=True):
            writer.write_tensor_data(_stored(piece, kind))
    finally:
        writer.close()


def _kinds(pieces: list[GgufTensor], quantization: GgufQuantization) -> list[Kind]:
    """Norms and biases stay float32, as llama.cpp's code for them expects; what has no whole blocks becomes f16."""
    layers = 1 + max((int(piece.name.split(".")[1]) for piece in pieces if piece.name.startswith("blk.")), default=-1)
    tied = all(piece.name != "output.weight" for piece in pieces)

    def kind(piece: GgufTensor) -> Kind:
        wanted = KINDS[quantization]
        if len(piece.shape) < 2 or wanted is Kind.F32:
            return Kind.F32
        if wanted is Kind.Q4_K:
            wanted = q4_k_m(piece.name, piece.shape[-1], layers=layers, tied=tied)
        elif piece.name in _WIDE and wanted in {Kind.Q4_0, Kind.Q5_0}:
            wanted = Kind.Q8_0
        block, _ = gguf.GGML_QUANT_SIZES[wanted]
        return wanted if piece.shape[-1] % block == 0 else Kind.F16

    return [kind(piece) for piece in pieces]


def _stored(piece: GgufTensor, kind: Kind) -> np.ndarray[Any, Any]:
    values = piece.values()
    if kind in _K_KINDS:
        return libgguf.quantize_rows(values, int(kind))
    with np.errstate(over="ignore"):
        stored = quantize(values, kind)
    if kind is Kind.F16 and not np.isfinite(stored).all():
        raise Invalid(
            f"{piece.name} has numbers that f16 cannot hold. Ask for bf16 or f32.",
            code="quantization_too_narrow",
            param="quantization",
        )
    return stored
