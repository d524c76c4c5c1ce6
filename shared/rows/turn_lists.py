"""Conversations that are no list of objects with our keys, rewritten into one. Pure, never raises.

Sources: the hub's Sequence features (an object of lists), the data set cards of LIMA and UltraChat (texts in turn),
LangChain (pairs of role and text), and files that mix the keys of OpenAI's messages with those of ShareGPT's items.
"""

from __future__ import annotations

from typing import Any, Final

from shared.rows import langchain
from shared.rows.formats import SHAREGPT_ROLES, Message
from shared.rows.shapes import MARKS, Row

_TALKS: Final = ("messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected")
_SPEAKERS: Final = ("from", "role")
_WORDS: Final = ("value", "content", "text")
_OURS: Final = (("from", "value"), ("role", "content"))
# What the report says of each form.
SAYS: Final = {
    "columns_of_messages": "An object of lists was read as a list of messages.",
    "texts_in_turn": "Texts in turn were read as questions and their answers.",
    "pairs_of_role_and_text": "Pairs of role and text were read as messages.",
    "single_messages": "A prompt or completion of one message was read as a list of it.",
    "langchain_messages": "Messages of LangChain (human, ai, …) were read as those of user and assistant.",
    "history_of_messages": "Messages in history were read as pairs of a question and its answer.",
    "mixed_keys": "Items of other keys for who speaks and what is said were read as those of from and value.",
}


def read(row: Row) -> tuple[Row, tuple[str, ...]]:
    """The row with its conversations as lists of objects, and the forms that they were read from."""
    made: Row = {}
    forms: list[str] = []
    for column in _TALKS:
        value = row.get(column)
        if (type(value) is not list or not value) and type(value) is not dict:
            continue
        in_turn, in_pair = column in {"conversations", "conversation"}, column in {"prompt", "completion"}
        listed = _listed(value, in_turn=in_turn, in_pair=in_pair)
        if listed is not None:
            made[column], form = listed
            forms.append(form)
    if "history" in row and (pairs := _pairs_of_history(row["history"])) is not None:
        made["history"] = pairs
        forms.append("history_of_messages")
    if not any(mark in row for mark in MARKS) and (turns := _in_turn(row.get("data"))) is not None:
        row = {key: value for key, value in row.items() if key != "data"}  # UltraChat
        made["conversations"] = turns
        forms.append("texts_in_turn")
    return ({**row, **made}, tuple(dict.fromkeys(forms))) if made else (row, ())


def _pairs_of_history(value: Any) -> list[Any] | None:
    """Messages of user and assistant in turn, of text alone, as pairs of a question and its answer."""
    if not isinstance(value, list) or not value or len(value) % 2:
        return None
    roles = [message.get("role") if isinstance(message, dict) and len(message) == 2 else None for message in value]
    if roles != ["user", "assistant"] * (len(value) // 2):
        return None
    texts = [message.get("content") for message in value]
    return [list(pair) for pair in zip(texts[::2], texts[1::2], strict=True)]


def _listed(value: Any, *, in_turn: bool, in_pair: bool) -> tuple[list[Any], str] | None:
    if isinstance(value, dict):
        if in_pair and isinstance(value.get("role"), str) and isinstance(value.get("content"), str):
            return [value], "single_messages"
        columns = _of_columns(value)
        return None if columns is None else (columns, "columns_of_messages")
    first = value[0]
    if type(first) is dict:
        usual = ("role" in first and "content" in first) or ("from" in first and "value" in first)  # nearly always
        return None if usual else _of_other_keys(value)
    if type(first) is str:
        turns = _in_turn(value) if in_turn else None
        return None if turns is None else (turns, "texts_in_turn")
    pairs = _of_pairs(value)
    return None if pairs is None else (pairs, "pairs_of_role_and_text")


def _of_other_keys(value: list[Any]) -> tuple[list[Any], str] | None:
    spoken = langchain.messages(value)
    if spoken is not None:
        return spoken, "langchain_messages"
    renamed = _renamed(value)
    return None if renamed is None else (renamed, "mixed_keys")


def _of_columns(value: dict[str, Any]) -> list[Any] | None:
    if not any(set(pair) <= value.keys() for pair in _OURS):
        return None
    lists = list(value.values())
    if not all(isinstance(column, list) for column in lists) or len({len(column) for column in lists}) != 1:
        return None
    rows = (zip(value, cells, strict=True) for cells in zip(*lists, strict=True))
    return [{key: cell for key, cell in row if cell is not None} for row in rows]


def _in_turn(value: Any) -> list[Any] | None:
    """Texts of a conversation: a question, its answer, and so on to the last answer."""
    if not isinstance(value, list) or not value or len(value) % 2 or not all(isinstance(text, str) for text in value):
        return None
    return [{"from": "gpt" if place % 2 else "human", "value": text} for place, text in enumerate(value)]


def _of_pairs(value: list[Any]) -> list[Any] | None:
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            return None
        if pair[0] not in SHAREGPT_ROLES:
            return None
    return [{"from": role, "value": text} for role, text in value]


def _renamed(value: list[Any]) -> list[Any] | None:
    """Items that all say who speaks and what under the same two keys, one of them not ours."""
    if not all(isinstance(item, dict) for item in value):
        return None
    speaker = _one_of(_SPEAKERS, value)
    words = _one_of(_WORDS, value)
    if speaker is None or words is None or (speaker, words) in _OURS:
        return None
    if not all(item.get(speaker) in SHAREGPT_ROLES for item in value if isinstance(item.get(speaker), str)):
        return None
    names = {speaker: "from", words: "value"}
    return [{names.get(key, key): part for key, part in item.items()} for item in value]


def _one_of(names: tuple[str, ...], items: list[dict[str, Any]]) -> str | None:
    """The only one of `names` that items have, if all have it."""
    had = {name for item in items for name in names if item.get(name) is not None}
    (only,) = had if len(had) == 1 else (None,)
    return only if only is not None and all(only in item for item in items) else None


def pairs_as_messages(turns: list[dict[str, Any]], asked: str, answer: str) -> list[Message]:
    """Pairs as messages; XTuner's may have a system text, which stands once where it stays the same."""
    messages: list[Message] = []
    system: Any = None
    for turn in turns:
        if turn.get("system") and turn["system"] != system:
            system = turn["system"]
            messages.append({"role": "system", "content": system})
        flag = {"train": turn["output_with_loss"]} if turn.get("output_with_loss") is not None else {}
        messages += [
            {"role": "user", "content": turn[asked]},
            {"role": "assistant", "content": turn[answer], **flag},
        ]
    return messages
