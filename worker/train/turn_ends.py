"""Finds trained answers that end without a token for the end: nothing would teach the model to stop.

A template may write no end of a turn at all, or text that is no token. The last answer of a row gets the tokenizer's
end token; earlier ones stay as the template writes them, for that is what a model is asked with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from worker.train.token_spans import Span
from worker.train.turns import AnswerTurn
from worker.train.unwritten import never_ended
from worker.train.written import MissingText

UNKNOWN_PLACE: Final[Span] = (0, 0)  # of an answer within a text that is trained whole


def unended(text: str, spans: Sequence[Span], *, turn: AnswerTurn, eos: str | None) -> list[MissingText]:
    """What is to be known of a row whose trained answers stand in `spans`. `eos` is added behind the text's end."""
    if turn.ends_by_token:
        return []
    without_more = [span for span in spans if not (eos and 0 < span[1] == len(text))]
    is_ended = all(text.endswith(turn.special_tokens, *span) for span in without_more)
    return [] if is_ended else [never_ended(turn.end.strip())]
