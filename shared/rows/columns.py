"""Judges columns that a shape does not read: refused if they mean something, else dropped and reported by name."""

from __future__ import annotations

import difflib
import functools
import json
import re
from typing import Any, Final

from shared.rows import formats
from shared.rows.findings import RowFindings, shown
from shared.rows.shapes import Row, Shape

MEDIA: Final = frozenset(
    {"image", "images", "img", "image_path", "image_url", "pixel_values", "video", "videos", "audio", "audios"}
)
_MEDIUM: Final = frozenset({"image", "images", "img", "imgs", "picture", "pictures", "photo", "photos"}) | frozenset(
    {"video", "videos", "audio", "audios", "media"}
)
# What a name may add to that and still be of the thing itself; `image_caption` and `video_id` are words about it.
_OF_FILES: Final = frozenset(
    {"path", "paths", "file", "files", "filename", "filenames", "url", "urls", "uri", "uris"}
) | (frozenset({"bytes", "data", "base64", "b64", "list"}))
_PLACEHOLDERS: Final = ("<image>", "<video>", "<audio>")
# Each would change what is trained, if it were obeyed. A shape that obeys one has it among its keys.
MEANT: Final = frozenset(
    {"system", "system_prompt", "tools", "functions", "history", "label", "kto_tag", "completion", "chosen", "rejected"}
    | {"weight", "train", "loss", "mask", "loss_scale", "train_on_input", "train_on_inputs"}
    | {"desirable", "role", "chat_template_kwargs", "enable_thinking", "mask_history", "reasoning"}
    | {"sample_weight", "loss_mask", "rejected_response", "rejected_messages", "reasoning_content", "thinking"}
)


@functools.lru_cache(maxsize=1024)
def is_media(name: str) -> bool:
    """Whether a column's name says that it holds pictures, videos or sounds, or where they lie."""
    plain = name.strip().casefold()
    first, *rest = filter(None, re.split(r"[\W_]+", plain)) if plain else ("",)
    alone = first in _MEDIUM and first != "media"
    return plain in MEDIA or (alone if not rest else first in _MEDIUM and _OF_FILES.issuperset(rest))


def judge(row: Row, shape: Shape, findings: RowFindings) -> None:
    """Refuse media, columns with a meaning that the shape has no place for, and near misses; note the others."""
    allowed = formats.KEYS[shape]
    for key in sorted(row.keys() - allowed):
        if is_media(key[:80]):
            _refuse_media(row, key, findings)
        elif row[key] is not None:
            _judge(key, row[key], allowed, findings)


def _refuse_media(row: Row, key: str, findings: RowFindings) -> None:
    if not _is_empty(row[key]):
        text = f"{key} is {shown(row[key])}; training is text-only, remove rows with images, video or audio."
        findings.refuse(key, "unsupported_content", text)
    elif any(mark in json.dumps(row) for mark in _PLACEHOLDERS):
        text = f"{key} is empty, but a message holds a placeholder such as <image>; training is text-only, remove it."
        findings.refuse(key, "unsupported_content", text)


def _judge(key: str, value: Any, allowed: frozenset[str], findings: RowFindings) -> None:
    name, meant = key[:80], near_miss(key[:80], allowed)
    listed = f"allowed: {', '.join(sorted(allowed))}"
    if meant:
        findings.refuse(name, "unknown_key", f"{name} is not a known key; did you mean {meant}? {listed}.")
    elif (key in MEANT or weighs(key)) and not (_is_empty(value) or _is_note(key, value)):
        text = f"{name} is {shown(value)}, for which rows of this format have no place; remove it, {listed}."
        findings.refuse(name, "unknown_key", text)
    else:
        findings.dropped.append(name)


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
    return last in {"weight", "weights", "mask", "masks"} or key.casefold().startswith("train_on_")


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {})
