"""The rules of every file that users bring, whole or in parts: purposes, names, formats."""

from __future__ import annotations

from typing import Final

from shared.errors import Invalid
from shared.rows.kinds import NAMES, is_offered
from shared.tenants.plain_text import printable

PURPOSES: Final = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
MIN_LIFE_SECONDS: Final = 3600
MAX_LIFE_SECONDS: Final = 2_592_000
_MAX_NAME_CHARACTERS: Final = 255


def clean_name(text: str) -> str:
    """The last part of the name the client gave; it is shown, and never used as a path."""
    return printable(text.replace("\\", "/").rsplit("/", 1)[-1], kept="")[-_MAX_NAME_CHARACTERS:] or "unnamed"


def refuse_purpose(purpose: str) -> None:
    """Raises Invalid unless `purpose` is one of OpenAI's for uploads."""
    if purpose not in PURPOSES:
        raise Invalid(
            f"Invalid value for 'purpose': must be one of {', '.join(PURPOSES)}, not '{purpose[:100]}'.",
            param="purpose",
        )


def refuse_name(filename: str, *, purpose: str, param: str) -> None:
    """Raises Invalid for a fine-tuning file whose name says that it is of no format that is read here."""
    if purpose == "fine-tune" and not is_offered(filename):
        raise Invalid(
            f"A fine-tuning file must have a name ending in {NAMES}, or without an ending, not '{filename}'.",
            param=param,
            code="invalid_file_format",
        )
