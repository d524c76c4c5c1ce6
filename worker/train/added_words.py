"""Words that a chat template adds to a trained answer, and that the row does not have.

A template may write an answer twice, or a phrase before each. Markup is none of that: control tokens, tags, and a name
between two of them (the channel of gpt-oss). Around calls and reasoning each template has words of its own ("name",
"arguments", "thought"); there a run of three words is a phrase, and nobody's markup.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

from worker.train.unwritten import words_added
from worker.train.written import REASONING, MissingText, forms, gather, pieces

_TAG: Final = r"(?:<[^<>\s]{1,60}>|\[/?[A-Z_]{2,40}\])"
_MARKUP: Final = re.compile(rf"(?:{_TAG}|\A)\w{{1,20}}(?={_TAG})|{_TAG}")
_WORD: Final = r"[^\W\d_]+[,.;:!?]?"
# Chinese and Japanese put no spaces between words: four characters are a phrase.
_PHRASE: Final = re.compile(rf"{_WORD}(?: {_WORD}){{2,}}|[\u3040-\u30ff\u3400-\u9fff]{{4,}}")
_SHOWN: Final = 60  # characters


def added_words(message: Mapping[str, Any], part: str, *, ends: Collection[str]) -> str | None:
    """What `part`, the trained text of an answer, says beside the answer, shortened; None where that is nothing."""
    content = message["content"].strip()
    if len(message) > 2 and (message.get("tool_calls") or any(message.get(key) for key in REASONING)):
        return _phrase_beside(message, part, ends=ends)
    if not content:
        return None
    before, written, behind = part.partition(content)
    if not written or (not before and behind.strip() in ends):  # nearly every answer
        return None
    words = _MARKUP.sub(" ", before) + " " + _MARKUP.sub(" ", behind)
    for known in (*ends, message.get("name") or " "):  # who speaks is said by the row
        words = words.replace(known, " ")
    words = " ".join(words.split())
    return _short(words) if re.search(r"[^\W_]", words) else None


def _phrase_beside(message: Mapping[str, Any], part: str, *, ends: Collection[str]) -> str | None:
    """The first phrase in `part` that is nothing of the message: not its text, its reasoning or its calls."""
    texts = [*pieces(message["content"]), *(message[key] for key in REASONING if isinstance(message.get(key), str))]
    left = _without(texts, part)
    if _PHRASE.search(left) is None:  # nearly every answer: values of calls are short
        return None
    for end in ends:
        left = left.replace(end, "\n")
    values: list[Any] = []
    for call in message.get("tool_calls") or ():
        gather(call.get("function"), values)
    spoken = (value for value in values if isinstance(value, str) and (" " in value or _PHRASE.search(value)))
    left = _MARKUP.sub("\n", _without(spoken, left))  # single words are no phrase, and stand within others
    phrase = _PHRASE.search(left)
    return None if phrase is None else _short(phrase[0])


def _without(texts: Iterable[str], part: str) -> str:
    """`part` without each of `texts`, once, in the first form in which it stands there; the longest goes first."""
    for text in sorted((text.strip() for text in texts), key=len, reverse=True):
        written = text if text in part else next((form for form in forms(text) if form in part), "")
        part = part.replace(written, "\n", 1) if written else part
    return part


def _short(words: str) -> str:
    return words if len(words) <= _SHOWN else words[:_SHOWN] + "…"


def words_of_template(learnt: Iterable[tuple[Mapping[str, Any], str]], *, ends: Collection[str]) -> list[MissingText]:
    """What is to be known of a row whose trained answers, each with its text as rendered, hold such words."""
    added = (added_words(message, part, ends=ends) for message, part in learnt)
    return next(([words_added(words)] for words in added if words is not None), [])
