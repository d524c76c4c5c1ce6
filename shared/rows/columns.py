"""Judges columns that a shape does not read: refused if they mean something, else dropped and reported by name."""

from __future__ import annotations

import difflib
import functools
import json
import re
from typing import Any, Final

from shared.rows import formats
from shared.rows.findings import RowFindings, shown
from shared.rows.loss_flags import CHOOSING, REASONING_KEYS, names_loss, truth_of
from shared.rows.shapes import Row, Shape

MEDIA: Final = frozenset(
    {"image", "images", "img", "image_path", "image_url", "pixel_values", "video", "videos", "audio", "audios"}
)
_MEDIUM: Final = frozenset({"image", "images", "img", "imgs", "picture", "pictures", "photo", "photos"}) | frozenset(
    {"video", "videos", "audio", "audios", "media", "screenshot", "screenshots"}
)
# What a name may add to that and still be of the thing itself; `image_caption` and `video_id` are words about it.
_OF_FILES: Final = frozenset(
    {"path", "paths", "file", "files", "filename", "filenames", "url", "urls", "uri", "uris"}
) | (frozenset({"bytes", "data", "base64", "b64", "list"}))
_MEDIA_FILE: Final = re.compile(
    r"(?i)\A(?:data:(?:image|video|audio)/|\S[^\n]*\.(?:png|jpe?g|gif|webp|bmp|tiff?|mp4|avi|mov|mkv|webm|wav|mp3|flac|ogg|m4a)\Z)"
)
_URL_CHARACTERS: Final = 2000
# What flags of whole rows choose among.
_CHOICES: Final = frozenset(
    {"true", "false", "yes", "no", "last", "first", "all", "none", "only", "last_turn", "last_assistant", "every"}
    | {"user", "human", "assistant", "gpt", "model", "system", "tool", "prompt", "completion", "response", "answer"}
)
# Of a text that was tokenized beside its rows: no loss hangs on it.
_TOKENIZED: Final = frozenset({"attention_mask", "special_tokens_mask", "padding_mask"})
_OF_A_SPLIT: Final = re.compile(r"in_\w+_train|used_in_training")  # where else a row stands: in_gsm8k_train
_BOXES: Final = {"ref", "bbox", "bbox_type", "image_id"}
_THOUGHTS: Final = frozenset({"cot", "chain_of_thought", "thought", "thoughts", "think"})
_PLACEHOLDERS: Final = ("<image>", "<video>", "<audio>", "<img>", "<|image|>", "<|image_pad|>", "<|image_1|>")
_ANSWERS: Final = ("completion", "response", "answer", "output")
_OF_TEMPLATES: Final = frozenset({"chat_template_kwargs", "enable_thinking"})  # values that a template asks for
_NO_PLACE: Final = "rows of this format have no place"
OF_CHATS: Final = frozenset({"system", "system_prompt", "history", "tools", *REASONING_KEYS})
# Columns that say how good an answer is, in a word or under a name that is not obeyed.
_OF_KTO: Final = "write true or false where it says how good the answer is (kto)"
_JUDGES: Final = {
    "label": _OF_KTO,
    "kto_tag": _OF_KTO,
    "desirable": 'where it says how good the answer is (kto), set training.columns to {"label": "desirable"}',
}
# Each would change what is trained, if it were obeyed. A shape that obeys one has it among its keys.
MEANT: Final = frozenset(
    {"system", "system_prompt", "tools", "functions", "history", "label", "kto_tag", "completion", "chosen", "rejected"}
    | {"weight", "train", "loss", "mask", "loss_scale", "train_on_input", "train_on_inputs"}
    | {"desirable", "role", "chat_template_kwargs", "enable_thinking", "mask_history", "reasoning"}
    | {"sample_weight", "loss_mask", "rejected_response", "rejected_messages", "rejected_message"}
    | {"systemInstruction", "system_instruction"}
    | {"reasoning_content", "thinking", "chosen_conversations", "rejected_conversations"}
)


@functools.lru_cache(maxsize=1024)
def is_media(name: str) -> bool:
    """Whether a column's name says that it holds pictures, videos or sounds, or where they lie."""
    plain = name.strip().casefold()
    first, *rest = filter(None, re.split(r"[\W_]+", plain)) if plain else ("",)
    alone = first in _MEDIUM and first != "media"
    if plain in MEDIA or not rest:
        return plain in MEDIA or alone
    return first in _MEDIUM and all(word in _OF_FILES or (word.isdigit() and first != "media") for word in rest)


def judge(row: Row, shape: Shape, findings: RowFindings) -> None:
    """Refuse media, columns with a meaning that the shape has no place for, and near misses; note the others."""
    allowed = formats.KEYS[shape]
    for key in sorted(row.keys() - allowed):
        if is_media(key[:80]):
            _refuse_media(row, key, findings)
        elif _is_boxes(row[key]):
            text = f"{key} holds places in pictures; training is text-only, remove rows with images, video or audio."
            findings.refuse(key, "unsupported_content", text)
        elif _is_medium_by_value(row[key]) and (
            _is_data(row[key]) or any(mark in json.dumps(row) for mark in _PLACEHOLDERS)
        ):
            _refuse_media(row, key, findings)
        elif row[key] is not None:
            _judge(row, key, allowed, findings)


def _is_medium_by_value(value: Any) -> bool:
    """Whether a value names a file of a picture, a video or a sound, or holds one as text."""
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, dict):
        first = next((first[key] for key in ("path", "url", "image") if isinstance(first.get(key), str)), None)
    return isinstance(first, str) and _MEDIA_FILE.search(first[:_URL_CHARACTERS].strip()) is not None


def _is_data(value: Any) -> bool:
    """Whether a value is a picture, a video or a sound itself, written as text."""
    return isinstance(value, str) and value.startswith("data:")


def _refuse_media(row: Row, key: str, findings: RowFindings) -> None:
    if not _is_empty(row[key]):
        text = f"{key} is {shown(row[key])}; training is text-only, remove rows with images, video or audio."
        findings.refuse(key, "unsupported_content", text)
    elif any(mark in json.dumps(row) for mark in _PLACEHOLDERS):
        text = f"{key} is empty, but a message holds a placeholder such as <image>; training is text-only, remove it."
        findings.refuse(key, "unsupported_content", text)


def _judge(row: Row, key: str, allowed: frozenset[str], findings: RowFindings) -> None:
    value = row[key]
    name, meant = key[:80], near_miss(key[:80], allowed)
    listed = f"allowed: {', '.join(sorted(allowed))}"
    if key == "conversation" and "chosen" in allowed:
        meant = None  # where both answers of a pair come from
    if meant:
        findings.refuse(name, "unknown_key", f"{name} is not a known key; did you mean {meant}? {listed}.")
    elif key in OF_CHATS and allowed == formats.KEYS["prompt_completion"] and not _means_nothing(key, value):
        text = f"{name} is {shown(value)}, for which text without a chat template has no place; read the row as a chat,"
        answer = next((name for name in _ANSWERS if name in row), "completion")
        as_chat = f'{{"instruction": "prompt", "output": "{answer}"}}'
        findings.refuse(name, "unknown_key", f"{text} with {as_chat} in training.columns.")
    elif (key.casefold() in _THOUGHTS or key in REASONING_KEYS) and not _means_nothing(key, value):
        text = (
            f"{name} is {shown(value)}, for which {_NO_PLACE}; write it as reasoning_content of an answer in messages"
        )
        findings.refuse(name, "unknown_key", f"{text}, or remove it.")
    elif key in _JUDGES and not _means_nothing(key, value):
        text = f"{name} is {shown(value)}, for which {_NO_PLACE}; {_JUDGES[key]}, or remove it, {listed}."
        findings.refuse(name, "unknown_key", text)
    elif key in _OF_TEMPLATES and not _means_nothing(key, value):
        text = f"{name} is {shown(value)}, for which {_NO_PLACE}; set it for all rows at the start of"
        given = "{%- set enable_thinking = false %}"
        findings.refuse(name, "unknown_key", f"{text} training.chat_template, as {given}, and remove it, {listed}.")
    elif (key in MEANT or weighs(key) or chooses(key, value)) and not _means_nothing(key, value):
        text = f"{name} is {shown(value)}, for which {_NO_PLACE}; remove it, {listed}."
        findings.refuse(name, "unknown_key", text)
    else:
        findings.dropped.append(name)


def _means_nothing(key: str, value: Any) -> bool:
    return _is_empty(value) or _is_note(key, value)


def _is_note(key: str, value: Any) -> bool:
    """Whether a column with a meaning holds something that cannot have it: topics as a label, reasoning "on"."""
    if key == "label":
        return isinstance(value, dict | list)
    return key in {"reasoning", "thinking"} and (isinstance(value, bool) or value in ("on", "off"))


@functools.lru_cache(maxsize=1024)
def near_miss(key: str, allowed: frozenset[str]) -> str | None:
    """The allowed key that a key is a slip of: capitals, a letter too few or too many."""
    plain = key.strip().casefold()
    near = difflib.get_close_matches(plain, sorted(allowed), n=1, cutoff=0.85)
    return near[0] if near and not plain.startswith(f"{near[0]}_") else None


def weighs(key: str) -> bool:
    """Whether a column's name says that it holds what is trained of a row: loss_weight, input_mask, example_weights."""
    *_, last = key.casefold().split("_")
    if key.casefold() in _TOKENIZED:
        return False
    return last in {"weight", "weights", "mask", "masks"} or key.casefold().startswith("train_on_")


def chooses(key: str, value: Any) -> bool:
    """Whether a column chooses what is trained of a row: its name says so, and its value is a choice, as a flag's is.

    `train_last_only`, `loss_on`, `roles_to_train`, `assistant_only_loss`; a loss in euros is none.
    """
    if key in CHOOSING:
        return truth_of(value) is True
    if not _speaks_of_loss(key[:80]):
        return False
    choices = value if isinstance(value, list) else [value]
    return bool(choices) and all(
        isinstance(choice, bool)
        or choice in (0, 1)
        or (isinstance(choice, str) and choice.strip().casefold() in _CHOICES)
        for choice in choices
    )


@functools.lru_cache(maxsize=1024)
def _speaks_of_loss(key: str) -> bool:
    return names_loss(key) and key.casefold() not in _TOKENIZED and not _OF_A_SPLIT.fullmatch(key)


def _is_boxes(value: Any) -> bool:
    """ms-swift's `objects`: names and boxes that stand for <ref-object> and <bbox> in the text."""
    return isinstance(value, dict) and bool(value.get("bbox")) and value.keys() <= _BOXES


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {})
