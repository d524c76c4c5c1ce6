"""How a chat template opens and ends an answer's turn: learnt from what it writes around an answer that is known.

The trained part of an answer is the answer with its end of turn: no header before it; no line break and no second end
token behind it, whether prefixes or {% generation %} markers told where it stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import jinja2

from worker.train.token_spans import Span

_ANSWER: Final = "An0ther answer"  # no template writes it by itself
ASKED: Final = {"role": "user", "content": "A qu3stion"}
A_TOOL: Final = {
    "type": "function",
    "function": {"name": "w3ather", "description": "A t0ol", "parameters": {"type": "object", "properties": {}}},
}
_ANSWERED: Final = {"role": "assistant", "content": _ANSWER}


@dataclass(frozen=True)
class AnswerTurn:
    """What stands before an answer and after it; empty where the template does not tell.

    `closing` stands behind the end of a conversation's last turn; `stops` are tokens that end a generation.
    `unasked`: the template writes the header with an answer alone, and none where it is asked for one.
    `lead`: the white space before an answer where the template knows no header; None where it has one, or none is told.
    """

    header: str
    end: str
    special_tokens: tuple[str, ...]
    closing: str = ""
    stops: tuple[str, ...] = ()
    unasked: bool = False
    lead: str | None = None

    def end_of(self, answer: str) -> int:
        """How many characters of `answer` are the answer and its end of turn."""
        last = len(answer.removesuffix(self.closing).rstrip())
        rest = last
        while end_token := next((token for token in self.special_tokens if answer.endswith(token, 0, rest)), None):
            rest = len(answer[: rest - len(end_token)].rstrip())
        if self.end and answer.startswith(self.end, rest):
            return rest + len(self.end)
        if self.end and answer.endswith(self.end, 0, last):  # an end that is no control token
            return last
        return _first_stop(answer, (rest, last), self.stops) if rest < last else len(answer)

    def within(self, text: str, span: Span) -> Span:
        """The part of a marked `span` that is trained; with the end of turn where the markers leave that out."""
        start, end = span
        start += self._header_within(text, start)
        if self.end and text.startswith(self.end, end) and not text[start:end].rstrip().endswith(self.end.strip()):
            end += len(self.end)
        return start, start + self.end_of(text[start:end])

    def _header_within(self, text: str, start: int) -> int:
        """How much of the header a span from `start` holds: some markers open within the header or before it."""
        size = len(self.header)
        inside = (inner for inner in range(size, 0, -1) if start + inner >= size)
        return next((inner for inner in inside if text.startswith(self.header, start + inner - size)), 0)


def learnt_turn(render: Callable[..., str], special_tokens: tuple[str, ...], stops: tuple[str, ...] = ()) -> AnswerTurn:
    """The turn of a template by what it writes around a known answer, at the end and with a question behind it.

    `render` takes messages and `add_generation_prompt`; where it raises TemplateError, nothing is learnt.
    A generation ends at the first of `stops`, so no turn goes on behind one.
    """
    try:
        asked = render([ASKED], add_generation_prompt=False)
        prompt = render([ASKED], add_generation_prompt=True)
        last = render([ASKED, _ANSWERED], add_generation_prompt=False)
        followed = render([ASKED, _ANSWERED, ASKED], add_generation_prompt=False)
    except jinja2.TemplateError:
        return AnswerTurn("", "", special_tokens, stops=stops)
    header = ""
    if prompt.startswith(asked) and last.startswith(asked):
        shared = common_prefix_length(prompt, last)
        header = last[len(asked) : shared]
    tails = [whole.partition(_ANSWER)[2] for whole in (last, followed)]
    end = _end_of_turn(tails, special_tokens)
    end = end[: _first_stop(end, (0, len(end)), stops)]
    closing = tails[0][len(end) :] if end else ""
    unasked = prompt == asked and last.startswith(asked) and not (closing.strip() and asked.endswith(closing))
    lead = None
    if unasked:
        written = last[len(asked) :].partition(_ANSWER)[0]
        header, lead = (written, None) if written.strip() else ("", written)
    elif not header:
        header = _header_behind(asked.removesuffix(closing), prompt, last)
    return AnswerTurn(header, end, special_tokens, closing, stops, unasked=unasked and bool(header), lead=lead)


def _header_behind(asked: str, prompt: str, last: str) -> str:
    """What a prompt ends with and the known answer stands behind; `asked`: the question without what closes it."""
    written = last.partition(_ANSWER)[0]
    if not (written.startswith(asked) and prompt.startswith(asked)):
        return ""
    asks, opens = prompt[len(asked) :], written[len(asked) :]
    header = asks[len(asks) - common_prefix_length(asks[::-1], opens[::-1]) :]
    return header if header.strip() else ""


def _end_of_turn(tails: Sequence[str], special_tokens: tuple[str, ...]) -> str:
    """What both tails begin with, up to the last control token: a text may go on with the next header or a last end."""
    last, followed = tails
    common = last[: common_prefix_length(last, followed)]
    ends = [match.end() for match in re.finditer("|".join(map(re.escape, special_tokens)) or "(?!)", common)]
    if ends:
        return common[: ends[-1]]
    return common.rstrip() if common == last else ""


def _first_stop(text: str, within: Span, stops: Sequence[str]) -> int:
    """Where the first of `stops` within a part of `text` ends; the end of the part where none is there."""
    ends = [place + len(stop) for stop in stops if stop and (place := text.find(stop, *within)) >= 0]
    return min(ends, default=within[1])


def common_prefix_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many items two sequences (of characters or of token ids) share at their start."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (first, other) in pairs if first != other), min(len(left), len(right)))
