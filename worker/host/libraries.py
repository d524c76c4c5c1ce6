"""Libraries of this host: those that its trainers run on, and those that feed trackers."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Final

_OF_TRAINERS: Final = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "accelerate",
    "safetensors",
    "tokenizers",
)
# Two come with the extra `trackers`. MLflow is spoken to by its REST interface, which needs no library.
_OF_TRACKERS: Final = {"wandb": "wandb", "mlflow": None, "tensorboard": "tensorboardX"}


def trainer_libraries() -> dict[str, str]:
    """Version by name: trainers run in the worker's own environment. A trainer of the operator's own needs none."""
    return dict(_versions())


def _versions() -> Iterator[tuple[str, str]]:
    for name in _OF_TRAINERS:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def fed_here() -> list[str]:
    """The trackers that this installation can feed."""
    return [tracker for tracker, library in _OF_TRACKERS.items() if library is None or find_spec(library) is not None]
