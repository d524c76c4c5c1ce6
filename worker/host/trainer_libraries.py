"""The libraries that trainers of this host run on: they run in the worker's own environment."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Final

_LIBRARIES: Final = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "safetensors", "tokenizers")


def trainer_libraries() -> dict[str, str]:
    """Version by name. A trainer of the operator's own needs none of them."""
    return dict(_versions())


def _versions() -> Iterator[tuple[str, str]]:
    for name in _LIBRARIES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue
