"""How a program that runs a library is asked and answers: one JSON object on standard input, one on standard output."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from shared.operating.secrecy import hide_secrets


def answer_once(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Print `work`'s answer to the object on standard input. Whatever the library prints goes to standard error."""
    hide_secrets()
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    document = work(json.load(sys.stdin))
    with answer:
        json.dump(document, answer)
