"""What a row asks and should be answered, and the plain measures of an answer. Pure.

Evaluations and looks during training share them: the trainer may import nothing else of the domain.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, Final

from shared.contract.spec import AnswerMeasure, Format

# The longest number first; "1,234.5" is one.
_NUMBER: Final = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d{1,300})(?:\.\d{1,300})?(?:[eE][-+]?\d{1,3})?")
NUMBER_CHARACTERS: Final = 20_000  # of the end of a text, where its last number is looked for


class NothingAsked(ValueError):
    """The row's first message is the answer."""


def asked_and_answer(format_: Format, record: dict[str, Any]) -> dict[str, Any]:
    """What a canonical row asks (`messages` or `text`), its `reference`, and the row (`record`, `format`) with both.

    Raises:
        NothingAsked
    """
    if format_ == "prompt_completion":
        return {
            "text": record["prompt"],
            "reference": record["completion"],
            "record": {"prompt": record["prompt"], "completion": record["completion"]},
            "format": "prompt_completion",
        }
    if format_ == "text":  # nothing is asked
        return {"reference": None, "record": {"text": record["text"]}, "format": "text"}
    messages = list(record["messages"])
    if format_ == "chat":
        last = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
        answer, messages = messages[last], messages[:last]
    else:
        answer = record["chosen"] if format_ == "preference" else record["completion"]
    if not messages:
        raise NothingAsked("The row's first message is the answer; nothing is asked before it.")
    chat = {"messages": [*messages, answer], **({"tools": record["tools"]} if record.get("tools") else {})}
    wanted = record.get("label", True)  # a bad answer is no reference
    return {
        "messages": messages,
        "reference": (answer.get("content") or "") if wanted else None,
        "record": chat if wanted else None,
        "format": "chat" if wanted else None,
    }


def is_reference(answer: str, reference: str, *, ignore_case: bool = False) -> bool:
    """Whether the answer is the reference, white space around both aside."""
    return _plain(answer, ignore_case=ignore_case) == _plain(reference, ignore_case=ignore_case)


def has_reference(answer: str, reference: str, *, ignore_case: bool = False) -> bool:
    """Whether the answer has the reference in it."""
    return _plain(reference, ignore_case=ignore_case) in _plain(answer, ignore_case=ignore_case)


def _plain(text: str, *, ignore_case: bool) -> str:
    return text.strip().casefold() if ignore_case else text.strip()


def parsed_json(text: str) -> Any:
    """The value of a JSON text (RFC 8259). Raises ValueError for anything that is none, NaN and infinity too."""
    try:
        return json.loads(text, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def is_json(text: str) -> bool:
    try:
        parsed_json(text)
    except ValueError:
        return False
    return True


def last_number(text: str) -> float | None:
    """The last number that is written in a text, if it is finite."""
    numbers = _NUMBER.findall(text[-NUMBER_CHARACTERS:])
    value = float(numbers[-1].replace(",", "")) if numbers else None
    return value if value is not None and math.isfinite(value) else None


def _same_number(answer: str, reference: str) -> float | None:
    wanted = last_number(reference)
    return None if wanted is None else float(last_number(answer) == wanted)


_SCORES: Final[dict[AnswerMeasure, Callable[[str, str], float | None]]] = {
    "exact_match": lambda answer, reference: float(is_reference(answer, reference)),
    "contains": lambda answer, reference: float(has_reference(answer, reference)),
    "json_valid": lambda answer, _: float(is_json(answer)),
    "numeric": _same_number,
}


def score(measure: AnswerMeasure, answer: str, reference: str) -> float | None:
    """1 or 0; None where the measure means nothing for the reference. With no options, as a look during training."""
    return _SCORES[measure](answer, reference)
