"""What the libraries below us refuse for good: the next attempt would meet the same error, so there is none.

Only before the first step: a run that has made a step has shown that base, options and libraries agree.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from shared.errors import Invalid
from worker.train.memory import out_of_memory_code

_FOR_GOOD: Final = (ValueError, TypeError, LookupError, AttributeError, NotImplementedError, ImportError)
# torch has no class for these. A RuntimeError that says
# anything else may be the device's or the network's: it is tried again.
_SHAPES: Final = re.compile(
    r"size mismatch|shape|must match|mat1 and mat2|not implemented for|same dtype|loading state_dict"
)
_FOLDERS: Final = re.compile(r"(?<![\w.])/(?:[\w.+-]+/)+")
_CHARACTERS: Final = 500


class TrainingStackFailed(Invalid):
    code = "training_stack_failed"


@contextmanager
def refused_for_good(doing: str) -> Iterator[None]:
    """Turn an error of the training stack that would come again into one that ends the job.

    Args:
        doing: what the trainer does within, for the user.

    Raises:
        TrainingStackFailed: with the error's type and last line, without folders; the traceback goes to stderr.
    """
    try:
        yield
    except (*_FOR_GOOD, RuntimeError) as error:
        if not _comes_again(error):
            raise
        traceback.print_exc()
        raise TrainingStackFailed(
            f"The training libraries failed while {doing}, and would again: {_last_line(error)}. "
            "Choose another base model or other options, or report it with the job's id."
        ) from error


def _comes_again(error: Exception) -> bool:
    if out_of_memory_code(error) is not None:
        return False
    return isinstance(error, _FOR_GOOD) or (type(error) is RuntimeError and _SHAPES.search(str(error)) is not None)


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return _FOLDERS.sub("…/", f"{type(error).__name__}: {lines[-1]}")[:_CHARACTERS].rstrip(". ")
