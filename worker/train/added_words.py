"""Words that a chat template writes into a trained answer of its own accord: nobody said them in the row.

A template may write an answer twice, or a phrase before each. Markup is none of that: control tokens, tags, and a name
between two of them (the channel of gpt-oss).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

from worker.train.unwritten import words_added
from worker.train.written import REASONING, Lost

_TAG: Final = r"(?:<[^<>\s]{1,60}>|\[/?[A-Z_]{2,40}\])"
_MARKUP: Final = re.compile(rf"(?:{_TAG}|\A)\w{{1,20}}(?={_TAG})|{_TAG}")
_SHOWN: Final = 60  # characters


def added_words(message: Mapping[str, Any], part: str, *, ends: Collection[str]) -> str | None:
    """What `part`, the trained text of an answer, says beside its content, shortened; None where that is nothing.

    Answers with calls or reasoning are left out: each template has words of its own around those.
    """
    content = message["content"].strip()
    if not content or message.get("tool_calls") or any(message.get(key) for key in REASONING):
        return None
    before, written, behind = part.partition(content)
    if not written or (not before and behind.strip() in ends):  # nearly every answer
        return None
    words = _MARKUP.sub(" ", before) + " " + _MARKUP.sub(" ", behind)
    for known in (*ends, message.get("name") or " "):  # who speaks is said by the row
        words = words.replace(known, " ")
    words = " ".join(words.split())
    if not re.search(r"[^\W_]", words):
        return None
    return words if len(words) <= _SHOWN else words[:_SHOWN] + "…"


def words_of_template(learnt: Iterable[tuple[Mapping[str, Any], str]], *, ends: Collection[str]) -> list[Lost]:
    """What is to be known of a row whose trained answers, each with its text as rendered, hold such words."""
    added = (added_words(message, part, ends=ends) for message, part in learnt)
    return next(([words_added(words)] for words in added if words is not None), [])
