"""docs/operations.md names what an operator can set, as it is.

After a change of a setting: `python -m tests.unit.test_operations` prints the table's rows anew.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from shared.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"


def row(name: str, field: FieldInfo) -> str:
    variable = field.validation_alias or f"TUNEPOOL_{name.upper()}"
    return f"| `{variable}` | {written(field.default)} | {(field.description or '').replace('|', '/')} |"


def written(default: object) -> str:
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    if default in (None, ""):
        return "–"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


ROWS = [row(name, field) for name, field in Settings.model_fields.items()]


def test_every_setting_stands_there_with_its_default_and_its_meaning() -> None:
    told = re.findall(r"^\| `[A-Z_]+` \| .*$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)

    assert told == ROWS, __doc__
    assert all(field.description for field in Settings.model_fields.values())


def test_durations_carry_their_unit_in_their_name() -> None:
    numbers = {name for name, field in Settings.model_fields.items() if field.annotation is float}

    assert {name for name in numbers if not name.endswith("_seconds")} == {"stall_factor"}


if __name__ == "__main__":
    sys.stdout.write("\n".join(ROWS) + "\n")
