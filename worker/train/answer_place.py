"""Finds an answer in a rendered conversation when the rendering of its beginning is no prefix of the whole.

Three kinds of template need this. One closes each conversation with tokens of its own (Phi's second end, the header
that Command R7B always writes). One writes the last message before an answer in another way than earlier messages
(results of tools in Hermes 3). One writes a header with an answer that it does not write with the question
(DiffusionGemma behind a tool's result).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from worker.train.token_spans import Span
from worker.train.turns import AnswerTurn, common_prefix_length

JsonObject = dict[str, Any]
_GAP: Final = 8  # characters of white space
_OPENED: Final = 40  # characters of what a prompt opens and a stored answer does not
_ANSWERS: Final = ("An0ther answer", "0ne more answer")  # they differ from their first character on


def without_closing(until: str, text: str, turn: AnswerTurn) -> str | None:
    """The part of `until`, a rendering of the first messages, that `text` begins with.

    None where they part before what the template closes a conversation with.
    """
    if text.startswith(until):
        return until
    opened = until.removesuffix(turn.closing)
    return opened if text.startswith(opened) else None


def place_of_first(until: str, asked: str, answered: str, prompt: str, turn: AnswerTurn) -> int | None:
    """Where an answer that nobody asked for begins in `until`, the rendering of it alone.

    `asked` is a known question, `answered` the question and that answer, `prompt` the question with a header behind.
    Behind a question the template writes header and answer as it does here, or here the answer alone (DeepSeek V3.1).
    """
    question = without_closing(asked, answered, turn)
    if question is None:
        return None
    whole = answered[len(question) :].removesuffix(turn.closing)
    header = common_prefix_length(prompt[len(question) :], whole)
    answer = whole[header:]
    return len(until) - len(answer) if answer and until.endswith(answer) else None


def start_by_asking(
    render: Callable[[list[JsonObject]], str], before: list[JsonObject], until: str, turn: AnswerTurn
) -> int | None:
    """Where the answer behind `before` begins in `until`: where two other answers do, behind the header.

    `render` raises TemplateError where the template fails. None where no header is known, or none is there.
    """
    if not turn.header.strip():
        return None
    first, other = (render([*before, {"role": "assistant", "content": answer}]) for answer in _ANSWERS)
    shared = first[: common_prefix_length(first, other)]
    start = shared.rfind(turn.header) + len(turn.header)
    earlier = common_prefix_length(render(before), until)  # a header of an earlier answer is none of this one
    is_there = turn.header in shared and start - len(turn.header) >= earlier and until.startswith(shared[:start])
    return start if is_there else None


def behind_header(text: str, start: int, turn: AnswerTurn) -> int:
    """`start` behind the header, where the prompt has no header, or ends in another way than the row goes on.

    `start` may stand within the header. Before that may stand white space, and the end of an earlier answer that
    nothing followed in the prompt.
    """
    if not turn.header.strip() or text.endswith(turn.header, 0, start):
        return start
    first, most = max(0, start - len(turn.header)), _GAP + len(max((turn.end, *turn.stops), key=len))
    place = text.find(turn.header, first, start + most + len(turn.header))
    gap = text[start:place].strip()
    ends = (turn.end.strip(), *turn.stops)
    return place + len(turn.header) if place >= 0 and (not gap or any(end.endswith(gap) for end in ends)) else start


def parts_early(rest: str, turn: AnswerTurn) -> bool:
    """Whether a prompt and its row part before the answer. `rest`: what only the prompt has, as an opened thought."""
    header = turn.header.strip()
    return header in rest if header else len(rest.strip()) > _OPENED


def behind_earlier(text: str, earlier: Span, span: Span) -> Span:
    """`span` without the answer before it: a template may write two answers in a row under one header."""
    if span[0] >= earlier[1]:
        return span
    joined = text[earlier[1] : span[1]]
    return span[1] - len(joined.lstrip()), span[1]


def span_by_exchange(
    render: Callable[[list[JsonObject]], str], messages: list[JsonObject], place: int, text: str, turn: AnswerTurn
) -> Span | None:
    """Where the answer at `place` stands in `text`, its end of turn included: between what is written around others.

    `render` raises TemplateError where the template fails. None where the conversation is written otherwise around the
    answer than around two others in its place, or where no header is known.
    """
    if not turn.header.strip() and turn.lead is None:
        return None
    first, other = (
        render([*messages[:place], {"role": "assistant", "content": answer}, *messages[place + 1 :]])
        for answer in _ANSWERS
    )
    shared = common_prefix_length(first, other)
    behind = first[shared + len(_ANSWERS[0]) :]
    if turn.lead is None:
        start = first.rfind(turn.header, 0, shared) + len(turn.header)
        known = start >= len(turn.header)
    else:
        start, known = shared - len(turn.lead), first.endswith(turn.lead, 0, shared)
    is_there = known and text.startswith(first[:start]) and text.endswith(behind)
    end = len(text) - len(behind)
    if not is_there or end < start or other != first[:shared] + _ANSWERS[1] + behind:
        return None
    return start, end + (len(turn.end) if behind.startswith(turn.end) else 0)
