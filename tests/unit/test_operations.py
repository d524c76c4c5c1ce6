"""docs/operations.md names what an operator can set, as it is."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import SecretStr

from shared.settings import Settings

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")


def told() -> dict[str, tuple[str, str]]:
    """Default and meaning by variable."""
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.*?) \| (.*?) \|$", PAGE, flags=re.MULTILINE)
    return {name: (default, meaning) for name, default, meaning in rows}


def written(default: object) -> str:
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    if default in (None, ""):
        return "–"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def test_every_setting_is_named_with_its_default_and_its_meaning() -> None:
    there_is = {
        str(field.validation_alias or f"TUNEPOOL_{name.upper()}"): written(field.default)
        for name, field in Settings.model_fields.items()
    }

    assert {name: default for name, (default, _) in told().items()} == there_is
    assert all(meaning.endswith((".", "…", "path")) for _, meaning in told().values())


def test_durations_and_sizes_carry_their_unit_in_the_name() -> None:
    numbers = {name for name, field in Settings.model_fields.items() if field.annotation is float}

    assert numbers - {name for name in numbers if name.endswith("_seconds")} == {"stall_factor"}
