"""A base model that stays in memory, and the adapters used last on it."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel
from peft.helpers import rescale_adapter_scale

from shared.contract.generation import ResidentBase
from shared.errors import Invalid
from worker.train.base_model import TORCH_DTYPES, four_bit, load_frozen
from worker.train.initialisation import WEIGHTS
from worker.train.rounding import round_to_4_bits
from worker.train.stack_faults import refused_for_good
from worker.train.tokenizer import load_tokenizer_of

NICENESS: Final = 10


class AdapterUnusable(Invalid):
    """The files are no adapter that fits on this base."""

    code = "adapter_unusable"


def begin(spec: ResidentBase) -> None:
    """Take as much of the processor as `spec` says. On a processor, trainings and the API go first."""
    torch.set_num_threads(spec.cpu_threads)
    if spec.device == "cpu":
        os.nice(NICENESS)


def load(spec: ResidentBase) -> tuple[Any, Any]:
    """(tokenizer, base). Raises TrainingStackFailed for what would fail again."""
    with refused_for_good("loading the base model"):
        return load_tokenizer_of(spec.base_model_path), load_resident(spec)


def load_resident(spec: ResidentBase) -> Any:
    """The base by training's own loader, in evaluation mode.

    On a CPU a 4-bit base is rounded, and not packed. These are the very numbers that training multiplied with, which it
    expanded anew at each step; an answer of a thousand tokens would pay for that a thousand times. It also leaves no
    layer that bitsandbytes could rearrange for answers (see `keep_training_layout`).
    """
    four_bits = None if spec.quantization is None else four_bit(spec.quantization)
    model = load_frozen(
        Path(spec.base_model_path),
        dtype=TORCH_DTYPES[spec.dtype],
        quantization=four_bits if spec.device != "cpu" else None,
        device=spec.device,
        place="cpu" if spec.device == "cpu" else torch.cuda.current_device(),
    )
    if four_bits is not None and spec.device == "cpu":
        round_to_4_bits(model, four_bits)
    return model.eval()


class ResidentModel:
    """A base with up to `kept` adapters in memory. One of them answers at a time.

    Attributes:
        base: the model without adapters.
        spoilt: the first adapter did not load whole; the base must be loaded anew.
    """

    def __init__(self, base: Any, *, kept: int) -> None:
        self.base = base
        self._kept = kept
        self._adapted: PeftModel | None = None
        self._held: OrderedDict[str, None] = OrderedDict()
        self.spoilt = False

    @property
    def held(self) -> list[str]:
        """Keys of the adapters in memory, the one used last at the end."""
        return list(self._held)

    def need(self, key: str, folder: Path) -> bool:
        """Have an adapter in memory; the one used least recently makes room. False: it was there already.

        Raises:
            AdapterUnusable: its files are not there, or do not fit on this base.
        """
        if key in self._held:
            self._held.move_to_end(key)
            return False
        if not (folder / WEIGHTS).is_file():  # PEFT would look for a pickle then
            raise AdapterUnusable("This adapter has no safetensors file; it cannot be used.", param="model")
        try:
            self._load(key, folder)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterUnusable(
                f"PEFT does not load this adapter on its base: {error}"[:500], param="model"
            ) from error
        self._held[key] = None
        while len(self._held) > self._kept:
            self._let_go(next(iter(self._held)))
        return True

    def _load(self, key: str, folder: Path) -> None:
        if self._adapted is None:
            self.spoilt = True  # until it is through: half an adapter cannot be taken out of a base again
            self._adapted = PeftModel.from_pretrained(self.base, str(folder), adapter_name=key).eval()
            self.spoilt = False
            return
        try:
            self._adapted.load_adapter(str(folder), adapter_name=key)
        except BaseException:
            if key in self._adapted.peft_config and self._held:  # half of it is there
                self._adapted.delete_adapter(key)
            raise
        self._adapted.eval()

    def _let_go(self, key: str) -> None:
        assert self._adapted is not None
        self._adapted.set_adapter(next(reversed(self._held)), inference_mode=True)
        self._adapted.delete_adapter(key)
        del self._held[key]

    @contextlib.contextmanager
    def speaking(self, key: str | None, scale: float) -> Iterator[Any]:
        """The model as it answers with adapter `key`, its update multiplied by `scale`; the base alone for None."""
        if self._adapted is None:
            yield self.base
            return
        if key is None:
            with self._adapted.disable_adapter():
                yield self._adapted
            return
        self._held.move_to_end(key)
        if self._adapted.active_adapter != key:
            self._adapted.set_adapter(key, inference_mode=True)
        with contextlib.nullcontext() if scale == 1.0 else rescale_adapter_scale(self._adapted, scale):
            yield self._adapted
