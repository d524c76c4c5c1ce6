"""How a chat template writes the calls of an answer, learnt from known ones, and how such a text is read again.

Two kinds are read: a JSON object with name and arguments (Hermes, Qwen, Llama 3, Mistral 7B), and a name with a JSON
object of arguments behind it (DeepSeek, Devstral, gpt-oss). Templates that write arguments one by one, between tags,
are not read: no tag says what is text there and what a number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from shared.contract.generation import ToolCall
from shared.errors import Invalid
from worker.train.answer_text import StopStrings
from worker.train.chat import ChatTemplate
from worker.train.turns import A_TOOL, ASKED

JsonObject = dict[str, Any]

_NAME: Final = "w3ather"
_PLAIN: Final = "An answ3r"
_DECODER: Final = json.JSONDecoder()


@dataclass(frozen=True)
class CallFormat:
    """Texts around calls, without the white space at their ends.

    `keys` are those of name and arguments in one object. Without keys the name stands before `middle` and the arguments
    behind it. `between` stands between two calls; None where the template writes one alone.
    """

    opening: str
    keys: tuple[str, str] | None
    middle: str
    between: str | None
    written: str  # two calls, or one, as the template wrote them

    def calls_in(self, text: str, names: Collection[str]) -> list[ToolCall]:
        """The calls of these tools that `text` begins with."""
        calls: list[ToolCall] = []
        opening = _pattern(self.opening)
        further = opening if self.between is None else _pattern(self.between)
        place = opening.match(text)
        while place is not None:
            read = self._read(text, place.end())
            if read is None or read[0].name not in names:
                break
            call, end = read
            calls.append(call)
            place = further.match(text, end) or (opening.match(text, end) if self.opening else None)
        return calls

    def _read(self, text: str, start: int) -> tuple[ToolCall, int] | None:
        """The call that begins at `start`, and where it ends."""
        name: Any = ""
        if self.keys is None:
            named = re.compile(rf"\s*([^\s{{]+?)\s*{_pattern(self.middle).pattern}").match(text, start)
            if named is None:
                return None
            name, start = named[1], named.end()
        try:
            value, end = _DECODER.raw_decode(text, len(text) - len(text[start:].lstrip()))
        except ValueError:
            return None
        if self.keys is not None:
            if not isinstance(value, dict):
                return None
            name, value = value.get(self.keys[0]), value.get(self.keys[1])
        arguments = _arguments(value)
        return (
            None if not isinstance(name, str) or arguments is None else (ToolCall(name=name, arguments=arguments), end)
        )


class CallReader:
    """Lets an answer's text through up to where calls may begin; at the end it tells what they are."""

    def __init__(self, form: CallFormat, names: Collection[str]) -> None:
        self._form, self._names = form, names
        # The first word alone: a model may set the white space within an opening otherwise.
        self._marker = (form.opening.split() or [""])[0]
        self._stop = StopStrings([self._marker])
        self._held = ""
        self._begun = False  # a text that is no call has begun, where calls have no opening

    def push(self, text: str) -> str:
        """The text that may be shown now."""
        if not self._marker:
            return self._push_unmarked(text)
        if self._stop.is_met():
            self._held += text
            return ""
        self._held += text
        shown = self._stop.push(text)
        self._held = self._held[len(shown) :]
        return shown

    def _push_unmarked(self, text: str) -> str:
        self._held += text
        if not self._begun and self._held.lstrip()[:1] in {"", "{", "["}:
            return ""
        self._begun = True
        shown, self._held = self._held, ""
        return shown

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The calls, and what was held back and is none."""
        calls = self._form.calls_in(self._held, self._names)
        return ("" if calls else self._held), calls


def _arguments(value: Any) -> str | None:
    """Arguments as JSON text, as OpenAI has them; None for what are none."""
    if isinstance(value, str):
        try:
            return value if isinstance(json.loads(value), dict) else None
        except ValueError:
            return None
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else None


def _pattern(text: str) -> re.Pattern[str]:
    """`text` with any white space around it, and where it has some."""
    return re.compile(r"\s*" + r"\s*".join(map(re.escape, text.split())))


# --- learning ---------------------------------------------------------------------------------------------------------


def learnt_format(template: ChatTemplate) -> CallFormat | None:
    """The form of calls of a template; None where it writes none, or in a way that is not read."""
    plain = _answer(template, {"role": "assistant", "content": _PLAIN})
    single, double = (_answer(template, _calling(count)) for count in (1, 2))
    if plain is None or single is None:
        return None
    single = _behind(plain, single)
    form = _in_one_object(single) or _behind_a_name(single)
    if form is None:
        return None
    opening, keys, middle, _ = form
    between = None if double is None else _between(_behind(plain, double), form)
    learnt = CallFormat(opening, keys, middle, between, written=(double or single) if between is not None else single)
    written = {1: single, 2: None if double is None else _behind(plain, double)}
    read = all(
        [call.name for call in learnt.calls_in(text, {_NAME})] == [_NAME] * count
        for count, text in written.items()
        if text is not None
    )
    return learnt if read else None  # a call that is told while another is lost would be worse than none


_Form = tuple[str, tuple[str, str] | None, str, int]  # opening, keys, middle, where the first call ends


def _calling(count: int) -> JsonObject:
    def call(number: int) -> JsonObject:
        function = {"name": _NAME, "arguments": json.dumps(_given(number))}
        return {"id": f"call0000{number}", "type": "function", "function": function}

    return {"role": "assistant", "content": "", "tool_calls": [call(number + 1) for number in range(count)]}


def _given(number: int) -> JsonObject:
    return {"c1ty": f"R0me{number}"}


def _answer(template: ChatTemplate, message: JsonObject) -> str | None:
    """The text that a template makes of an answer; None where it fails, or where the answer's bounds are not clear."""
    try:
        rendered = template.render_with_spans(template.prepared([ASKED, message]), tools=[A_TOOL])
    except Invalid:
        return None
    text, (start, end) = rendered.text, rendered.spans[-1]
    for token in template.ends:  # the end of the prompt may share the beginning of a control token: "<" of "<think>"
        place = text.find(token, max(0, start - len(token) + 1), start + len(token) - 1)
        start = place if 0 <= place < start else start
    return text[start:end]


def _behind(plain: str, answer: str) -> str:
    """An answer without what the template writes before any (an empty thought)."""
    return answer.removeprefix(plain.partition(_PLAIN)[0])


def _in_one_object(text: str) -> _Form | None:
    for place in (match.start() for match in re.finditer(r"\{", text)):
        try:
            value, end = _DECODER.raw_decode(text, place)
        except ValueError:
            continue
        name = next((key for key, part in value.items() if part == _NAME), None)
        arguments = next((key for key, part in value.items() if _is_given(part)), None)
        if name is not None and arguments is not None:
            return text[:place].strip(), (name, arguments), "", end
    return None


def _behind_a_name(text: str) -> _Form | None:
    opening, name, rest = text.partition(_NAME)
    for place in (match.start() for match in re.finditer(r"\{", rest)):
        try:
            value, end = _DECODER.raw_decode(rest, place)
        except ValueError:
            continue
        if name and opening.strip() and _is_given(value):
            return opening.strip(), None, rest[:place].strip(), len(opening) + len(name) + end
    return None


def _is_given(value: Any) -> bool:
    arguments = _arguments(value)
    return arguments is not None and json.loads(arguments) == _given(1)


def _between(double: str, form: _Form) -> str | None:
    """What stands between two calls; None where the second is not there."""
    _, keys, _, end = form
    rest = double[end:]
    place = rest.find(_NAME)
    if place < 0:
        return None
    if keys is not None:
        place = rest.rfind("{", 0, place)
    return rest[:place].strip() if place >= 0 else None
