"""System text where a chat template has no place for it: it opens the first question, as its users write it by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

JsonObject = dict[str, Any]


def merged(messages: Sequence[JsonObject]) -> tuple[list[JsonObject], list[int]]:
    """`messages` with the system text before the first question in that question, and each one's place in the row.

    Later system messages, and those of a conversation without a question, stay where they are.
    """
    first = next((place for place, message in enumerate(messages) if message["role"] == "user"), 0)
    moved = [place for place, message in enumerate(messages[:first]) if message["role"] == "system"]
    if not moved:
        return list(messages), list(range(len(messages)))
    texts = [messages[place].get("content") or "" for place in (*moved, first)]
    question = {**messages[first], "content": "\n\n".join(filter(None, texts))}
    places = [place for place in range(len(messages)) if place not in moved]
    return [question if place == first else messages[place] for place in places], places
