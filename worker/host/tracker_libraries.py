"""Which trackers this installation can feed: the extra `trackers` has the libraries of two of them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final

# MLflow is spoken to by its REST interface, which needs no library.
_LIBRARIES: Final = {"wandb": "wandb", "mlflow": None, "tensorboard": "tensorboardX"}


def fed_here() -> list[str]:
    """The trackers whose library is installed."""
    return [tracker for tracker, library in _LIBRARIES.items() if library is None or find_spec(library) is not None]
