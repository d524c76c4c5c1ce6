"""The last gate before rows are packed: whether the loaded model itself keeps them apart.

Attention sees by its positions where a packed row begins. What carries state along the sequence (convolutions, state
spaces, linear attention) runs on from the row before: transformers 5.23 tells it of no row's start without kernels of
CUDA's, and the loss stays plausible. `shared/settle/sequence_state.py` settles the same from config.json before. This
module asks the model itself, so that a family which config.json does not give away is safe too. Attention that does not
look at positions leaks as well: `worker/train/row_leak.py` tries it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from torch import nn

from shared.contract.families import APART, BLIND_TO_POSITIONS, CARRYING_CLASSES
from shared.contract.passes import is_packed
from shared.contract.spec import AttemptSpec
from shared.errors import Invalid
from worker.train.reporting import Reporter
from worker.train.row_leak import rows_leak

_OTHER_SENSES: Final = re.compile(r"vision|visual|image|audio|speech|whisper|encoder", re.IGNORECASE)


def packed_only_apart(spec: AttemptSpec, model: Any, *, reporter: Reporter) -> AttemptSpec:
    """`spec`, with packing off where `model` would let packed rows leak into each other; says so.

    Raises:
        Invalid: the user asked for packing by name.
    """
    if not is_packed(spec.job):
        return spec
    leak = _leak(spec, model)
    if leak is None:
        return spec
    if spec.packing_asked:
        param = "tunepool.training.packing"
        raise Invalid(f"'{param}' is true, but {leak}; use packing false, or leave it out.", param=param)
    reporter.say(f"Packing is off: {leak}.", level="warn")
    training = spec.job.training.model_copy(update={"packing": False})
    return spec.model_copy(update={"job": spec.job.model_copy(update={"training": training})})


def _leak(spec: AttemptSpec, model: Any) -> str | None:
    """How packed rows would leak, by the layers that are there and then by a try; None: they do not."""
    carries = carries_state(model)
    if carries is not None:
        return f"packed rows would leak into each other through the model's {carries} layers"
    family = model.config.get_text_config().model_type
    if family in BLIND_TO_POSITIONS:
        return f"packed rows would leak into each other: the attention of {family} does not look at positions"
    whole = spec.job.placement.strategy != "fsdp"  # otherwise it lies in the host's memory, too slow to be tried
    if whole and rows_leak(model):
        return f"packed rows leak into each other in {type(model).__name__}, as a try with two rows shows"
    return None


def is_tried(model: Any) -> bool:
    """Whether nothing but a try tells if its packed rows would leak."""
    return carries_state(model) is None and model.config.get_text_config().model_type not in BLIND_TO_POSITIONS


def carries_state(model: Any) -> str | None:
    """The kind or class of the first layer that reads along the sequence by other means than attention; None: none.

    Of layer kinds only those count as attention that are known to keep packed rows apart.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return next((kind for kind in kinds if kind not in APART), None) or next(_classes(model), None)


def _classes(model: nn.Module) -> Iterator[str]:
    """Class names of the text model's modules that carry state; encoders of images and sounds are not packed."""
    for path, module in model.named_modules():
        name = type(module).__name__
        if not _OTHER_SENSES.search(f"{path} {name}") and (
            isinstance(module, nn.Conv1d) or CARRYING_CLASSES.search(name)
        ):
            yield name
