"""Compares a row with its rendering: is everything that the row says in the text that its chat template made of it?

A template may leave out what it does not know: tool calls, a system message, reasoning. Nothing in the rendered text
tells so, and a model would be trained on empty answers. So each message is looked for in the text, in order; an answer
within its own span. What templates do to values without losing them counts as present: white space around them is cut,
JSON is spaced and ordered anew, characters are escaped (`forms`), reasoning is parted from the answer (`pieces`).
"""

from __future__ import annotations

import functools
import html
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from shared.errors import Invalid
from worker.train.token_spans import Span
from worker.train.turns import common_prefix_length

JsonObject = dict[str, Any]

REASONING: Final = ("reasoning_content", "reasoning", "thinking")  # Qwen and DeepSeek, OpenRouter, gpt-oss
_REASONING_TAGS: Final = re.compile(r"</?think(?:ing)?>|\[/?THINK\]")
# tojson of plain jinja makes HTML safe so; that of transformers does not.
_HTML_SAFE: Final = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "'": "\\u0027"})


_KEPT_CHARACTERS: Final = 20_000  # of a tool whose words are remembered, and ten times that of a text with tools
NAME_LOST: Final = "name_not_rendered"
MERGE: Final = 'To open the first question with it, set training.system_prompt to "merge".'


class MissingText(NamedTuple):
    """Something that a row says and its rendered text does not. `message` is its place in the row; None for tools."""

    message: int | None
    code: str
    what: str
    remedy: str = ""


class _Value(NamedTuple):
    """A value in a call or in a tool, and its place."""

    what: str
    value: Any


def lost(
    messages: Sequence[JsonObject], *, tools: Sequence[JsonObject] | None, text: str, spans: Sequence[Span] | None
) -> list[MissingText]:
    """What of `messages` and `tools` is not in `text`.

    `spans` are the answers' places in the text, in order; None where they are not known: then all is looked for in
    order alone. Messages are as the template got them: arguments are objects where they are JSON.
    """
    losses = _lost_tools(tools, text) if tools else []
    cursor, answers = 0, list(spans or ())
    for place, message in enumerate(messages):
        if message["role"] == "assistant" and answers:
            start, cursor = answers.pop(0)
            losses += _lost(place, message, text, (start, cursor))
            continue
        # Some templates write the system message before the last question, others at the start.
        start, end = (
            (0, len(text)) if message["role"] == "system" else (cursor, answers[0][0] if answers else len(text))
        )
        missing = _lost(place, message, text, (start, end))
        losses += missing
        if not missing and spans is None and message["role"] != "system":
            cursor = max(cursor, _end(message["content"].strip(), text, (start, end)))
    return losses


def numbered(losses: Sequence[MissingText], numbers: Sequence[int]) -> list[MissingText]:
    """`losses` with messages by their places in the row."""
    return [loss if loss.message is None else loss._replace(message=numbers[loss.message]) for loss in losses]


def refuse_lost(losses: Sequence[MissingText], *, trained: Callable[[int], bool]) -> None:
    """Raise Invalid (code `not_rendered`) where a message that `trained` tells to carry loss has lost something."""
    contents = (loss for loss in losses if loss.code != NAME_LOST)  # who speaks is no part of what is said
    gone = next((loss for loss in contents if loss.message is not None and trained(loss.message)), None)
    if gone is not None:
        if gone.remedy:
            raise Invalid(f"{_leaves_out(gone)} {gone.remedy}", code="not_rendered", param="training.system_prompt")
        raise Invalid(
            f"{_leaves_out(gone)} A model would be trained on an answer that nobody wrote. Choose a base model whose"
            " template writes it, give such a template in training.chat_template, or set the message's weight to 0.",
            code="not_rendered",
            param="training.chat_template",
        )


def refuse_system_text_left_out(messages: Sequence[JsonObject], text: str) -> None:
    """Raise Invalid (code `not_rendered`) where a system text is not in the rendered text: its own remedy helps."""
    for place, message in enumerate(messages):
        if message["role"] == "system":
            refuse_lost(list(_lost_answer(place, message, text, (0, len(text)))), trained=lambda _: True)


def _leaves_out(gone: MissingText) -> str:
    return f"The chat template leaves out what messages[{gone.message}] says: {gone.what}."


def refuse_empty(answer: str, place: int, *, ends: tuple[str, ...]) -> None:
    """Raise Invalid (code `empty_answer`) where a trained answer, as rendered, is nothing but tokens that end it."""
    rest = answer.strip()
    while rest.endswith(ends):
        rest = next(rest.removesuffix(end) for end in ends if rest.endswith(end)).rstrip()
    if not rest:
        raise Invalid(
            f"messages[{place}] is trained and empty: the model would learn to say nothing. Give it text or tool_calls,"
            " or set its weight to 0.",
            code="empty_answer",
            param="training_file",
        )


def _end(content: str, text: str, within: Span) -> int:
    return text.find(content, *within) + len(content) if content and content in text else 0


def _lost(place: int, message: JsonObject, text: str, within: Span) -> list[MissingText]:
    if len(message) == 2 and text.find(message["content"].strip(), *within) >= 0:  # nearly every message
        return []
    return list(_lost_answer(place, message, text, within))


def _lost_answer(place: int, message: JsonObject, text: str, within: Span) -> Iterator[MissingText]:
    """What of one message is not in `text[within]`."""
    content = message["content"].strip()
    if content and text.find(content, *within) < 0 and (gone := _lost_piece(content, text[slice(*within)])):
        remedy = MERGE if message["role"] == "system" else ""
        yield MissingText(place, "content_not_rendered", _named(message, gone), remedy)
    if len(message) == 2:  # role and content: most messages
        return
    name = message.get("name")
    if name and message["role"] in {"user", "system"} and not _is_in(name, text[slice(*within)]):
        yield MissingText(place, NAME_LOST, f"the name {_shown(name)}")
    for key in REASONING:
        reasoning = message.get(key)
        if isinstance(reasoning, str) and not _is_in(reasoning, text[slice(*within)]):
            yield MissingText(place, "reasoning_not_rendered", f"{key} {_shown(reasoning)}")
    if message.get("tool_calls") and not _are_in(message["tool_calls"], part := text[slice(*within)]):
        gone_call = _first_lost(_values_of_calls(message["tool_calls"]), part)
        if gone_call is not None:
            yield MissingText(place, "tool_call_not_rendered", gone_call)


def _named(message: JsonObject, piece: str) -> str:
    kinds = {"system": "the system text", "tool": "the tool's result", "user": "the text"}
    return f"{kinds.get(message['role'], 'the text')} {_shown(piece)}"


def _lost_piece(content: str, part: str) -> str | None:
    """The first piece of `content` that is not in `part`, in order; None when all of it is there in some form."""
    cursor = 0
    for piece in pieces(content):
        places = [(part.find(form, cursor), form) for form in forms(piece)]
        place, form = next((candidate for candidate in places if candidate[0] >= 0), (-1, ""))
        if place < 0:
            return None if _is_json_in(content, part) else piece
        cursor = place + len(form)
    return None


def pieces(content: str) -> list[str]:
    """The text between reasoning's tags: templates that know them write the tags their own way."""
    return [piece.strip() for piece in _REASONING_TAGS.split(content) if piece.strip()]


def _is_json_in(content: str, part: str) -> bool:
    """Whether `content` is JSON whose values are all in `part`: a template may write a tool's result anew."""
    if not content.startswith(("{", "[")):
        return False
    try:
        values = list(_leaves(json.loads(content), "the result"))
    except ValueError:
        return False
    return bool(values) and _first_lost(values, part) is None


def _are_in(calls: Sequence[JsonObject], part: str) -> bool:
    """Whether `part` holds all of the calls. `_first_lost` says what is missing; naming each value takes most time."""
    values: list[Any] = []
    for call in calls:
        function = call.get("function") or {}
        values.append(function.get("name", ""))
        gather(function.get("arguments"), values)
    given: Counter[tuple[type, str]] = Counter()
    for value in values:
        kind = (type(value), str(value))
        given[kind] += 1
        if not _is_in(value, part, times=given[kind]):
            return False
    return True


def gather(value: Any, into: list[Any]) -> None:
    """The keys and plain values of `_leaves`."""
    if isinstance(value, dict):
        for key, below in value.items():
            into.append(str(key))
            gather(below, into)
    elif isinstance(value, list):
        for below in value:
            gather(below, into)
    else:
        into.append(value)


def _values_of_calls(calls: Sequence[JsonObject]) -> Iterator[_Value]:
    for place, call in enumerate(calls):
        function = call.get("function") or {}
        name = function.get("name", "")
        yield _Value(f"tool_calls[{place}], the call of {_shown(name)}", name)
        yield from _leaves(function.get("arguments"), f"tool_calls[{place}].arguments")


def _leaves(value: Any, at: str) -> Iterator[_Value]:
    """Each key and each plain value of nested objects and lists. Depth is bounded by the check of files."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield _Value(f"{at}, the key {_shown(key)}", str(key))
            yield from _leaves(below, f"{at}.{key}")
    elif isinstance(value, list):
        for place, below in enumerate(value):
            yield from _leaves(below, f"{at}[{place}]")
    else:
        yield _Value(f"{at} {_shown(value)}", value)


def _first_lost(values: Iterator[_Value] | list[_Value], part: str) -> str | None:
    """The first of `values` that stands in `part` less often than it was given: a second call may be left out."""
    given: Counter[tuple[type, str]] = Counter()
    for what, value in values:
        kind = (type(value), str(value))
        given[kind] += 1
        if not _is_in(value, part, times=given[kind]):
            return what
    return None


def _is_in(value: Any, part: str, *, times: int = 1) -> bool:
    """Whether `part` holds `value` in any form, `times` over. Any order: keys are sorted by some templates."""
    if not isinstance(value, str):
        return any(_count_words(spelling, part) >= times for spelling in {json.dumps(value), str(value)})
    plain = value.strip()
    if plain in part if times == 1 or not plain else part.count(plain) >= times:
        return True
    return any(part.count(form) >= times for form in forms(plain))


def _count_words(word: str, part: str) -> int:
    """How often a number, true, false or null stands alone."""
    return len(re.findall(rf"(?<![\w.]){re.escape(word)}(?![\w])", part))


def forms(text: str) -> list[str]:
    """How templates write a text: as it is, as JSON (plain, in ASCII, safe in HTML, twice), as HTML, as Python does."""
    plain, ascii_only = (json.dumps(text, ensure_ascii=only)[1:-1] for only in (False, True))
    twice = [json.dumps(form, ensure_ascii=False)[1:-1] for form in (plain, ascii_only)]
    safe = [plain.translate(_HTML_SAFE), ascii_only.translate(_HTML_SAFE)]
    as_html = html.escape(text)
    as_jinja = as_html.replace("&quot;", "&#34;").replace("&#x27;", "&#39;")
    others = [as_html, as_jinja, repr(text)[1:-1]]
    return list(dict.fromkeys([text, plain, ascii_only, *safe, *twice, *others]))


class _WrittenTools:
    """Where the tools of an earlier row stood in its text: most rows of a file have the same ones, written alike.

    `part` is what two texts with these tools have in common there, once it holds all that the tools say. A text that
    holds it holds them.
    """

    _TRIES: Final = 3  # to find that part; where rows come between the tools, there is none

    def __init__(self, tools: Sequence[JsonObject], text: str) -> None:
        self._tools, self._text, self._part, self._tries = tools, text, "", 0

    def are(self, tools: Sequence[JsonObject]) -> bool:
        return tools == self._tools

    def are_in(self, text: str) -> bool:
        return bool(self._part) and self._part in text

    def learn(self, text: str, values: Sequence[str]) -> None:
        """Look at a second text that has all of the tools' `values`."""
        if self._part or self._tries == self._TRIES:
            return
        self._tries += 1
        part = _shared_around(max(values, key=len, default=""), self._text, text)
        if all(_is_in(value, part) for value in values):
            self._part = part


_written_tools: Final[dict[tuple[int, str], _WrittenTools]] = {}  # by number of tools and the first one's name
_TOOLS_KEPT: Final = 64


def _shared_around(word: str, earlier: str, later: str) -> str:
    """What two texts have in common around a word, in whichever form it stands there; empty where it does not."""
    places = ((earlier.find(form), later.find(form)) for form in forms(word.strip()))
    here, there = next((pair for pair in places if min(pair) >= 0), (0, 0))
    behind = common_prefix_length(earlier[here:], later[there:])
    before = common_prefix_length(earlier[:here][::-1], later[:there][::-1])
    return earlier[here - before : here + behind]


def _lost_tools(tools: Sequence[JsonObject], text: str) -> list[MissingText]:
    """The first thing missing of each tool: its name, what it does, its parameters and the values they may take."""
    key = (len(tools), str(tools[0].get("function", tools[0]).get("name")))
    known = _written_tools.get(key)
    if known is not None and known.are(tools) and known.are_in(text):
        return []
    words = [_words_of(tool.get("function", tool)) for tool in tools]
    losses = []
    for place, (tool, values) in enumerate(zip(tools, words, strict=True)):
        gone = next((what for what, value in values if not _is_in(value, text)), None)
        if gone is not None:
            of_tool = _shown(tool.get("function", tool).get("name"))
            losses.append(MissingText(None, "tools_not_rendered", f"tools[{place}]{gone} of the tool {of_tool}"))
    if (known is None or not known.are(tools)) and len(text) < 10 * _KEPT_CHARACTERS:
        if len(_written_tools) == _TOOLS_KEPT:
            _written_tools.clear()
        _written_tools[key] = _WrittenTools(tools, text)
    elif known is not None and known.are(tools) and not losses:
        known.learn(text, [word.value for values in words for word in values])
    return losses


def _words_of(function: JsonObject) -> tuple[_Value, ...]:
    written = json.dumps(function)
    return _words_of_tool(written) if len(written) < _KEPT_CHARACTERS else _words_of_tool.__wrapped__(written)


@functools.lru_cache(maxsize=256)
def _words_of_tool(function: str) -> tuple[_Value, ...]:
    """All texts of a function given as JSON, by their places in it: most rows of a file have the same tools."""
    read = json.loads(function)
    values = [_Value(f".{key}", read.get(key)) for key in ("name", "description")]
    values += _words_of_schema(read.get("parameters"), ".parameters")
    return tuple(value for value in values if isinstance(value.value, str))


def _words_of_schema(schema: Any, at: str) -> Iterator[_Value]:
    """Names of parameters, descriptions and enumerated texts. Types are written in other words by some templates."""
    if isinstance(schema, list):
        for below in schema:
            yield from _words_of_schema(below, at)
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if key == "properties" and isinstance(value, dict):
            for name, below in value.items():
                yield _Value(f"{at}, the parameter {_shown(name)}", name)
                yield from _words_of_schema(below, f"{at}.{name}")
        elif key in {"description", "const"}:
            yield _Value(f"{at}, {key}", value)
        elif key == "enum" and isinstance(value, list):
            yield from (_Value(f"{at}, the value {_shown(item)}", item) for item in value)
        else:
            yield from _words_of_schema(value, at)


def _shown(value: Any) -> str:
    text = json.dumps(value[:60] if isinstance(value, str) else value, ensure_ascii=False)
    return text if len(text) <= 50 else text[:49] + "…"
