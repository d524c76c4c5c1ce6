"""Messages between a worker and a program that it has started ahead, over a socket that the program inherits.

It is started as `python -m MODULE --handover DESCRIPTOR [HELD]`. It imports its libraries and loads the base model
that the file HELD names (shared/contract/prepared.py). It says WAITING and reads one line, a Handover. Then it says
TAKEN, closes the socket, and goes on as `python -m MODULE SPEC OUT` would have. When the socket closes before, nobody
wants it any more, and it ends.
"""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, ConfigDict

ARGUMENT: Final = "--handover"
WAITING: Final = b"waiting\n"
TAKEN: Final = b"taken\n"
LINE_BYTES: Final = 16 * 1024


class Handover(BaseModel):
    """The work: paths of the spec and of the folder that is written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    spec: str
    out: str
