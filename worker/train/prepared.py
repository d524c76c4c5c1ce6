"""Base models in 4 bits on the disk: upstream's own form of a quantised model, read back to the last bit."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any, Final

import torch
from bitsandbytes.functional import QuantState
from pydantic import BaseModel, ConfigDict

from shared.contract.prepared import HeldBase
from shared.contract.spec import AttemptSpec, Dtype
from worker.train import row_leak
from worker.train.base_model import TORCH_DTYPES, load_frozen

TRIED: Final = "tried.json"


class ModelFindings(BaseModel):
    """What was found by running the model when it was prepared; a run costs a small job as much as a step."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    leak_between_rows: float


def load_prepared(folder: Path, *, base: Path, dtype: Dtype) -> Any:
    """The model that `folder` holds, as `load_frozen` makes it of the weights in `base`."""
    model = load_frozen(folder, dtype=TORCH_DTYPES[dtype], quantization=None, device="cpu", place="cpu", as_saved=True)
    # Where a model came from travels on with what is made of it.
    model.config._name_or_path = model.name_or_path = str(base)
    if (tried := folder / TRIED).is_file():
        row_leak.know(model, ModelFindings.model_validate_json(tried.read_bytes()).leak_between_rows)
    return model


def fingerprints(model: torch.nn.Module) -> dict[str, str]:
    """A digest of every tensor that `model` computes with, and of how each 4-bit weight is read."""
    held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    return {name: _fingerprint(tensor) for name, tensor in sorted(held.items())}


def _fingerprint(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256()
    _feed(digest, tensor)
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        digest.update(f"{state.blocksize} {state.quant_type} {state.dtype} {tuple(state.shape or ())}".encode())
        for part in (state.absmax, state.code, state.offset):
            if part is not None:
                _feed(digest, part)
        state = _beneath(state)
    return digest.hexdigest()


def _beneath(state: QuantState) -> Any:
    """How the scales are quantised themselves (double quantization)."""
    return state.state2 if state.nested else None


def _feed(digest: Any, tensor: torch.Tensor) -> None:
    plain = tensor.detach().as_subclass(torch.Tensor).contiguous()
    digest.update(f"{plain.dtype} {tuple(plain.shape)} ".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)


class HeldModel:
    """A base model in memory before there is work; one job gets it, or it goes."""

    def __init__(self, path: str, model: Any) -> None:
        self._path, self._model = path, model

    @classmethod
    def load(cls, file: Path) -> HeldModel | None:
        """The model that a HeldBase names. None when it does not load: whoever comes loads it then, and says why."""
        held = HeldBase.model_validate_json(file.read_bytes())
        try:
            model = load_prepared(Path(held.prepared_path), base=Path(held.base_model_path), dtype=held.dtype)
        except (OSError, ValueError, KeyError, RuntimeError, MemoryError) as error:
            print(f"the base model is not held: {error}"[:300], file=sys.stderr, flush=True)
            return None
        return cls(held.prepared_path, model)

    def taken_by(self, spec: AttemptSpec) -> Any:
        """The model, if it is the one that this attempt would load; else None. It is not held any longer."""
        model, self._model = self._model, None
        return model if spec.prepared_path == self._path else None
