"""How a chat template opens and ends an answer's turn, learnt from the text around a known answer.

The trained part of an answer is the answer with its end of turn: no header before it; no line break and no second end
token behind it, whether prefixes or {% generation %} markers told where it stands.
"""

from __future__ import annotations

import functools
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

    `closing` stands behind the end of a conversation's last turn; `stops` are tokens that end a generation. `unasked`:
    the template writes the header with an answer alone, and none where it is asked for one. `lead`: the white space
    before an answer where the template knows no header; None where it has a header, or where it is not known. `tail`:
    the white space behind each answer where no end is known: it parts turns, and ends none.
    """

    header: str
    end: str
    special_tokens: tuple[str, ...]
    closing: str = ""
    stops: tuple[str, ...] = ()
    unasked: bool = False
    lead: str | None = None
    tail: str = ""

    @functools.cached_property
    def ways_to_end(self) -> tuple[str, ...]:
        """Control tokens, and text where the template ends a turn with that."""
        end = self.end.strip()
        return self.special_tokens if not end or end in self.special_tokens else (end, *self.special_tokens)

    @functools.cached_property
    def ends_by_token(self) -> bool:
        """Whether every turn ends with a control token, as those of nearly all templates do."""
        return self.end.endswith(self.special_tokens)

    def end_of(self, answer: str) -> int:
        """How many characters of `answer` are the answer and its end of turn."""
        whole = answer.removesuffix(self.closing).rstrip()
        rest = last = len(whole)
        if self.end and whole.endswith(self.end):  # nearly always, and no second end before it
            before = whole[: -len(self.end)].rstrip()
            if not before.endswith(self.special_tokens):
                return last
        while end_token := next((token for token in self.special_tokens if answer.endswith(token, 0, rest)), None):
            rest = len(answer[: rest - len(end_token)].rstrip())
        if self.end and answer.startswith(self.end, rest):
            return rest + len(self.end)
        if self.end and answer.endswith(self.end, 0, last):  # an end that is no control token
            return last
        if rest < last:
            return _first_stop(answer, (rest, last), self.stops)
        is_end = self.closing.startswith(self.special_tokens)  # of the last turn alone, where no other has one
        return len((answer if is_end else answer.removesuffix(self.closing)).removesuffix(self.tail))

    def within(self, text: str, span: Span) -> Span:
        """The part of a marked `span` that is trained; with the end of turn where the markers leave that out."""
        start, end = span
        start += self._header_within(text, start)
        if self.end and text.startswith(self.end, end) and not text[start:end].rstrip().endswith(self.end.strip()):
            end += len(self.end)
        return start, start + self.end_of(text[start:end])

    def stopped(self, text: str, spans: Sequence[Span], stops: Sequence[str]) -> tuple[str, list[Span]]:
        """`text` and the answers in it, where no end of turn is known.

        A generation stops at the token that opens the next turn (GLM-4.5), if that is among `stops`. The text ends with
        its last answer, so that the end token that a reader adds stands right behind it.
        """
        ended = []
        for start, end in spans:
            stop = next((token for token in stops if text.startswith(token, end)), "")
            ended.append((start, end + (0 if text.endswith(tuple(stops), start, end) else len(stop))))
        ends_with_answer = ended and text[ended[-1][1] :] in {self.tail, self.tail + self.closing}
        return (text[: ended[-1][1]] if ends_with_answer else text), ended

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
    tail = "" if end else _white_tail(tails, stops)
    closing = tails[0][len(end) :] if end else _closing((asked, last, followed), tail, special_tokens)
    unasked = prompt == asked and last.startswith(asked) and not (closing.strip() and asked.endswith(closing))
    lead = None
    if unasked:
        written = last[len(asked) :].partition(_ANSWER)[0]
        header, lead = (written, None) if written.strip() else ("", written)
    elif not header:
        header = _header_behind(asked.removesuffix(closing), prompt, last)
    is_unasked = unasked and bool(header)
    return AnswerTurn(header, end, special_tokens, closing, stops, unasked=is_unasked, lead=lead, tail=tail)


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
    ends = [match.end() for match in re.finditer(_any_of(special_tokens), common)]
    if ends:
        return common[: ends[-1]]
    return common.rstrip() if common == last else ""


def _white_tail(tails: Sequence[str], stops: Sequence[str]) -> str:
    """White space that both tails begin with; empty where a stop follows it, since it then belongs to the end."""
    last, followed = tails
    common = last[: common_prefix_length(last, followed)]
    return common if common.isspace() and not followed.startswith(tuple(filter(None, stops)), len(common)) else ""


def _closing(wholes: Sequence[str], tail: str, special_tokens: tuple[str, ...]) -> str:
    """What stands behind every conversation, where no turn ends by itself: an end of the last one alone.

    Different ends may end alike (<|return|>, <|end|>): no part of a control token is a closing.
    """
    backward = [whole[::-1] for whole in wholes]
    shared = min((common_prefix_length(backward[0], other) for other in backward[1:]), default=0)
    closing = backward[0][:shared][::-1].removeprefix(tail)
    start, known = len(wholes[0]) - len(closing), re.finditer(_any_of(special_tokens), wholes[0])
    is_cut = any(match.start() < start < match.end() for match in known)
    return closing if closing.strip() and not is_cut else ""


def _any_of(tokens: tuple[str, ...]) -> str:
    return "|".join(map(re.escape, tokens)) or "(?!)"


def _first_stop(text: str, within: Span, stops: Sequence[str]) -> int:
    """Where the first of `stops` within a part of `text` ends; the end of the part where none is there."""
    ends = [place + len(stop) for stop in stops if stop and (place := text.find(stop, *within)) >= 0]
    return min(ends, default=within[1])


def in_parts(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its text as a list of parts."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def common_prefix_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many items two sequences (of characters or of token ids) share at their start."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (first, other) in pairs if first != other), min(len(left), len(right)))
