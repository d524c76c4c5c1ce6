"""The user's part of a tuned model's name. Pure.

OpenAI takes any text of 1 to 64 characters and writes it as it can stand in a name; so does this.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Final

from pydantic import AfterValidator, StringConstraints

from shared.errors import Invalid

_KEPT: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_OTHER: Final = re.compile(r"[^A-Za-z0-9_.-]+")


def slug(text: str) -> str:
    """`text` as it stands in a model's name: letters without their accents, a hyphen for everything else.

    A text that needs no change stays as it is. Raises Invalid, `param` suffix, where nothing is left.
    """
    if _KEPT.fullmatch(text):
        return text
    plain = unicodedata.normalize("NFKD", text.replace("ß", "ss"))
    bare = "".join(letter for letter in plain if not unicodedata.combining(letter))
    name = _OTHER.sub("-", bare).strip("-.")[:64].rstrip("-.")
    if not name:
        raise Invalid(
            "Invalid value for 'suffix': it needs at least one of the characters A-Z, a-z, 0-9 or _.", param="suffix"
        )
    return name


Suffix = Annotated[str, StringConstraints(min_length=1, max_length=64), AfterValidator(slug)]
