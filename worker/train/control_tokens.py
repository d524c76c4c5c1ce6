"""User text stays text: a chat template may write control tokens of the model, the text of a row may not.

A row's strings go into the template with a mark behind the first character of all that reads like a control token, or
like its beginning or end. Templates carry the mark along as any other character; where it stands in the rendered text,
the control token there is the row's own. The mark is taken out again, so the text is what the template writes.
"""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from tokenizers import AddedToken, Tokenizer

from shared.errors import Invalid
from worker.train.guarded_model import without_words

JsonObject = dict[str, Any]
Span = tuple[int, int]  # characters, half open

# Characters that Unicode keeps for programs' own use: a row is marked with one that it does not hold.
_MARKS: Final = tuple(map(chr, range(0xFDD0, 0xFDF0)))
_COMPARED: Final = frozenset({"role", "type"})  # templates compare their words, and write none of them in brackets
# Tags of reasoning in an answer mean what they say, also where they are control tokens (Magistral).
_REASONING_TAG: Final = re.compile(r"</?think(?:ing)?>|\[/?THINK\]")
# SentencePiece has its own three at the front; some files forget to call one of them special (Phi-3's </s>).
_OF_SENTENCEPIECE: Final = {"<unk>", "<s>", "</s>"}


class PlainText(NamedTuple):
    """A text, spans in it, and the places of characters that no control token may cover: they are a row's own."""

    text: str
    spans: list[Span]
    own: Sequence[int]


@dataclass(frozen=True)
class MarkedRow:
    """Messages and tools to render, and the mark that stands in them; empty where nothing had to be marked."""

    messages: list[JsonObject]
    tools: list[JsonObject] | None
    mark: str = ""

    def plain(self, text: str, spans: Sequence[Span] = ()) -> PlainText:
        """A rendered text and spans in it without marks. Raises Invalid where the template altered the marks."""
        return _without_mark(text, list(spans), self.mark) if self.mark else PlainText(text, list(spans), ())


class ControlTokens:
    """The control tokens of a tokenizer: those that it calls special, and those of `named` that it has."""

    def __init__(self, backend: Any, named: Iterable[str] = ()) -> None:
        wanted = set(named)
        self.ids: dict[str, int] = {
            token.content: number
            for number, token in backend.get_added_tokens_decoder().items()
            if token.content
            and (token.special or token.content in wanted or (number < 3 and token.content in _OF_SENTENCEPIECE))
        }
        self._pattern = re.compile(_any_of(self.ids))
        self._edges = tuple({edge for spelled in self.ids for edge in (spelled[0], spelled[-1])})
        self._longest = max(map(len, self.ids), default=0)

    def spelled_in(self, text: str) -> list[int]:
        """Where control tokens are spelled in `text`, in characters."""
        if not self._may_spell(text):
            return []
        return [match.start() for match in self._pattern.finditer(text)]

    def first_kept(self, text: str, own: Sequence[int]) -> str | None:
        """The first control token in `text` that covers a place of `own`: it is read as text."""
        return next((match[0] for match in self._pattern.finditer(text) if _covers(match, own)), None) if own else None

    def marked(self, messages: list[JsonObject], tools: list[JsonObject] | None) -> MarkedRow:
        """A row as it is rendered, its own text marked where that reads like control tokens.

        Raises:
            Invalid: the row holds every character that could be a mark.
        """
        if not tools and not any(self._asks_for_marks(message) for message in messages):
            return MarkedRow(messages, tools)
        mark = _unused(messages, tools)
        marked = [self._marked_message(message, mark) for message in messages]
        marked_tools = tools and [self._marked_below(tool, mark) for tool in tools]
        if marked == messages and marked_tools == tools:
            return MarkedRow(messages, tools)
        return MarkedRow(marked, marked_tools, mark)

    def _asks_for_marks(self, message: JsonObject) -> bool:
        return len(message) > 2 or self._may_spell(message["content"])

    def _may_spell(self, text: str) -> bool:
        """A quick look: most texts hold no character that a control token begins or ends with."""
        for edge in self._edges:  # noqa: SIM110 -- any() takes three times as long
            if edge in text:
                return True
        return False

    def _marked_message(self, message: JsonObject, mark: str) -> JsonObject:
        marked = {key: self._marked_below(value, mark, at=key) for key, value in message.items() if key != "content"}
        content = self._marked_text(message["content"], mark, keeps_tags=message["role"] == "assistant")
        return {key: content if key == "content" else marked[key] for key in message}

    def _marked_below(self, value: Any, mark: str, *, at: str = "", names: bool = False) -> Any:
        """`value` with every text in it marked; keys too where they are `names` that the row chose.

        Depth is bounded by the check of files.
        """
        if isinstance(value, str):
            return self._marked_text(value, mark) if at in _COMPARED and not names else self._marked_name(value, mark)
        if isinstance(value, list):
            return [self._marked_below(item, mark, at=at, names=names) for item in value]
        if not isinstance(value, dict):
            return value
        of_call = names or at == "arguments"
        marked_key = self._marked_name if of_call or at == "properties" else self._marked_text
        return {
            marked_key(key, mark): self._marked_below(below, mark, at="" if at == "properties" else key, names=of_call)
            for key, below in value.items()
        }

    def _marked_name(self, text: str, mark: str) -> str:
        """A template may write a name or a value between angle brackets of its own."""
        if text.strip() not in self._inner:
            return self._marked_text(text, mark)
        first = len(text) - len(text.lstrip())
        return f"{text[: first + 1]}{mark}{text[first + 1 :]}"

    def _marked_text(self, text: str, mark: str, *, keeps_tags: bool = False) -> str:
        if not self._may_spell(text):
            return text
        places = {
            match.start()
            for match in self._pattern.finditer(text)
            if not (keeps_tags and _REASONING_TAG.fullmatch(match[0]))
        }
        places |= set(self._edges_of(text))
        for place in sorted(places, reverse=True):
            text = f"{text[: place + 1]}{mark}{text[place + 1 :]}"
        return text

    def _edges_of(self, text: str) -> Iterator[int]:
        """Where a control token may begin that the template would complete, and where one of its would end."""
        first, last = len(text) - len(text.lstrip()), len(text.rstrip())
        heads, tails = self._cut
        yield from (place for place in range(max(first, last - self._longest), last) if text[place:last] in heads)
        if any(text[first : first + size] in tails for size in range(1, self._longest)):
            yield first

    @functools.cached_property
    def _cut(self) -> tuple[frozenset[str], frozenset[str]]:
        """Beginnings and ends of control tokens, none of them whole."""
        heads = {token[:size] for token in self.ids for size in range(1, len(token))}
        return frozenset(heads), frozenset(token[size:] for token in self.ids for size in range(1, len(token)))

    @functools.cached_property
    def _inner(self) -> frozenset[str]:
        """What stands within control tokens, without their first and last character."""
        return frozenset(
            token[start:end]
            for token in self.ids
            for start in range(1, len(token))
            for end in range(start + 1, len(token))
        )


class Respelling:
    """A tokenizer whose control tokens are spelled with characters that a text does not hold.

    It reads any text as text; control tokens that a template wrote are respelled for it, character by character, so
    all places in the text stay the same.
    """

    _BLOCKS: Final = tuple(range(0x100000, 0x110000 - 0x4000, 0x4000))  # of the last plane for private use

    def __init__(self, backend: Any, controls: ControlTokens) -> None:
        self._backend, self._controls = backend, controls
        added = [token.content for token in backend.get_added_tokens_decoder().values()]
        self._added = re.compile(_any_of(added))

    def respelled(self, text: str, own: Sequence[int]) -> tuple[str, RespelledTokens]:
        """`text` with those control tokens respelled that cover no place of `own`, and the tokenizer for it.

        Raises:
            Invalid: the text holds characters of every block that control tokens could be spelled with.
        """
        blocks = (block for block in self._BLOCKS if not re.search(f"[{chr(block)}-{chr(block + 0x3FFF)}]", text))
        tokens = self._tokens(block=next(blocks, None))

        def spelled(match: re.Match[str]) -> str:
            return match[0] if _covers(match, own) else tokens.spelling.get(match[0], match[0])

        return self._added.sub(spelled, text), tokens

    @functools.cache  # noqa: B019 -- one or two blocks; a reader lives as long as its program
    def _tokens(self, *, block: int | None) -> RespelledTokens:
        if block is None:
            raise _no_character_left()
        filler = chr(block + 0x3FFF)
        spelling = {
            token: chr(block + place) + filler * (len(token) - 1) for place, token in enumerate(self._controls.ids)
        }
        return RespelledTokens(self._backend, self._controls, spelling)


class RespelledTokens:
    """One spelling of a tokenizer's control tokens."""

    def __init__(self, backend: Any, controls: ControlTokens, spelling: dict[str, str]) -> None:
        self.spelling = spelling
        self._theirs, self._controls = backend, controls
        ids = {token.content: number for number, token in backend.get_added_tokens_decoder().items()}
        self.ids = {spelling.get(content, content): number for content, number in ids.items()}
        self.split: Callable[[str], list[str]] = re.compile(f"({_any_of(self.ids)})").split

    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids of a respelled text, and the characters of each."""
        backend, known = self._lent
        encoded = backend.encode(text, add_special_tokens=False)
        if not self._reserved.isdisjoint(encoded.ids):  # the model itself makes a control token of plain text
            backend, known = self._guarded
            encoded = backend.encode(text, add_special_tokens=False)
        return [known.get(token_id, token_id) for token_id in encoded.ids], encoded.offsets

    @functools.cached_property
    def _reserved(self) -> frozenset[int]:
        model = self._theirs.model
        unknown = {self._controls.ids.get(getattr(model, "unk_token", None) or ""), getattr(model, "unk_id", None)}
        return frozenset(self._controls.ids.values()) - unknown

    @functools.cached_property
    def _lent(self) -> tuple[Any, dict[int, int]]:
        """The tokenizer with its own model, and the same parts around it."""
        return self._built(self._theirs.model)

    @functools.cached_property
    def _guarded(self) -> tuple[Any, dict[int, int]]:
        """The tokenizer with a model that cannot write control tokens."""
        return self._built(without_words(self._theirs.model, self.spelling))

    def _built(self, model: Any) -> tuple[Any, dict[int, int]]:
        """The tokenizer around `model`, and its ids as the tokenizer at hand has them, where they differ."""
        backend = Tokenizer(model)
        for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            if (theirs := getattr(self._theirs, part)) is not None:
                setattr(backend, part, theirs)
        flags = ("single_word", "lstrip", "rstrip", "normalized")
        added = [token for token in self._theirs.get_added_tokens_decoder().values() if token.content]
        backend.add_tokens(
            [
                AddedToken(
                    self.spelling.get(token.content, token.content), **{flag: getattr(token, flag) for flag in flags}
                )
                for token in added
            ]
        )
        theirs = {backend.token_to_id(content): number for content, number in self.ids.items()}
        return backend, {here: number for here, number in theirs.items() if here is not None}


def _covers(match: re.Match[str], own: Sequence[int]) -> bool:
    place = bisect.bisect_left(own, match.start())
    return place < len(own) and own[place] < match.end()


def _without_mark(text: str, spans: list[Span], mark: str) -> PlainText:
    """JSON without characters beyond ASCII, and Python's own form of a text, write the mark as an escape."""
    escape = f"u{ord(mark):04x}"
    marks = list(re.finditer(rf"{mark}|\\+{escape}", text))
    pieces, own, places, gone, end = [], [], [0], [0], 0
    for match in marks:
        pieces.append(text[end : match.start()])
        own.append(match.start() - gone[-1] - 1)
        end = match.end()
        gone.append(gone[-1] + len(match[0]))
        places.append(end)
    clean = "".join([*pieces, text[end:]])
    if escape in clean.lower():
        raise Invalid(
            "The chat template alters text that reads like a control token of the model, so that it cannot be kept as"
            " text. Take such text out of the row, or give another template in training.chat_template.",
            code="control_token_text",
            param="training.chat_template",
        )

    def moved(place: int) -> int:
        return place - gone[bisect.bisect_right(places, place) - 1]

    return PlainText(clean, [(moved(start), moved(stop)) for start, stop in spans], own)


def _unused(*parts: Any) -> str:
    """A mark that a row does not hold, in any form. Raises Invalid."""
    text = ascii(parts).lower()
    mark = next((candidate for candidate in _MARKS if f"u{ord(candidate):04x}" not in text), None)
    if mark is None:
        raise _no_character_left()
    return mark


def _no_character_left() -> Invalid:
    return Invalid(
        "The row holds text that reads like a control token of the model beside characters that Unicode keeps for"
        " programs' own use, all of them. Take either out.",
        code="control_token_text",
        param="training_file",
    )


def _any_of(words: Iterable[str]) -> str:
    """A pattern of words: at each place the longest."""
    longest_first = sorted(filter(None, words), key=len, reverse=True)
    return "|".join(map(re.escape, longest_first)) or "(?!)"
