"""The official client, imported when it is first asked for.

It takes longer to import than most commands take in all, for its types of a thousand answers. What speaks of it in
annotations only names it under `TYPE_CHECKING`. An `except official.…` is looked up while an error passes, not before.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from openai import (
        APIConnectionError,
        APIStatusError,
        InternalServerError,
        NotFoundError,
        OpenAI,
        PermissionDeniedError,
    )
    from openai.types.fine_tuning import FineTuningJob

__all__ = [
    "APIConnectionError",
    "APIStatusError",
    "FineTuningJob",
    "InternalServerError",
    "NotFoundError",
    "OpenAI",
    "PermissionDeniedError",
]

_ELSEWHERE: Final = {"FineTuningJob": "openai.types.fine_tuning"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(name)
    return getattr(import_module(_ELSEWHERE.get(name, "openai")), name)
