"""From values to HTML. Everything a user wrote is escaped; figures have units, and moments are `<time>`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from api.ui import page_files, wording
from api.ui.filled import Filled
from shared.errors import TunepoolError
from shared.tenants.plain_text import printable
from shared.tenants.sign_ins import SignedIn

_NONE: Final = "–"
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def moment(seconds: float | None) -> Markup:
    """A moment in UTC; page.js shows it in the viewer's zone."""
    if seconds is None:
        return escape(_NONE)
    at = datetime.fromtimestamp(seconds, tz=UTC)
    stamp = at.isoformat(timespec="seconds").replace("+00:00", "Z")
    return Markup('<time datetime="{}">{} UTC</time>').format(stamp, at.strftime("%Y-%m-%d %H:%M"))


def size(count: float | None) -> str:
    """Bytes with a unit of 1,024."""
    if count is None:
        return _NONE
    value, unit = float(count), 0
    while abs(value) >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def number(value: float | None) -> str:
    """Digits in groups of three; four significant digits of what is no whole number."""
    if value is None:
        return _NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def duration(seconds: float | None) -> str:
    """The two largest units."""
    if seconds is None:
        return _NONE
    left = max(0, round(seconds))
    if left < 60:
        return f"{left} s"
    parts = [(left // 86400, "d"), (left // 3600 % 24, "h"), (left // 60 % 60, "min"), (left % 60, "s")]
    first = next(place for place, (count, _) in enumerate(parts) if count)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count)


def shown(value: Any) -> str:
    """A value of a spec as text."""
    if isinstance(value, str):
        return printable(value)
    if value is None:
        return _NONE
    return printable(json.dumps(value, ensure_ascii=False))


def pretty(value: Any) -> str:
    return printable(json.dumps(value, ensure_ascii=False, indent=2))


def short(identifier: str) -> str:
    """An id's kind and its last eight characters, which differ most."""
    head, dash, tail = identifier.rpartition("-") if "-" in identifier else identifier.rpartition("_")
    return f"{head}{dash}…{tail[-8:]}" if len(tail) > 12 else identifier


def clean(text: str | None) -> Markup:
    """A stranger's text: escaped, and without what turns lines around."""
    return escape(printable(text or ""))


def clean_log(text: str) -> Markup:
    """Lines of a log: escaped, inert, with their tabs."""
    return escape(printable(text, kept="\n\t"))


def alike(values: Iterable[str]) -> list[tuple[str, str]]:
    """Options of a choice that are called what they are."""
    return [(value, value) for value in values]


def options(things: Iterable[Any], name: str) -> list[tuple[str, str]]:
    """Options of a choice among things with ids, called by one of their fields."""
    return [(thing.id, f"{getattr(thing, name)} · {short(thing.id)}") for thing in things]


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}" if whole else "0"


ENVIRONMENT: Final = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {
    "moment": moment,
    "size": size,
    "number": number,
    "duration": duration,
    "shown": shown,
    "pretty": pretty,
    "short": short,
    "clean": clean,
    "clean_log": clean_log,
    "status_word": wording.status_word,
    "alike": alike,
    "options": options,
}
ENVIRONMENT.globals |= {"file": page_files.address, "missing": page_files.MISSING, "percent": percent}


def fragment(template: str, visit: SignedIn, **values: Any) -> str:
    """A part of a page, as its stream sends it."""
    return ENVIRONMENT.get_template(template).render(**_base(visit), **values)


def filled(request: Request) -> Filled:
    """The form that this request has sent, as far as the page that answers shows it again."""
    sent: Filled = getattr(request.state, "filled", Filled())
    return sent


def page(request: Request, visit: SignedIn | None, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
    """A whole page."""
    base = {"path": request.url.path, "filled": filled(request), **_base(visit)}
    html = ENVIRONMENT.get_template(template).render(**base, **values)
    return HTMLResponse(html, status_code=status)


def _base(visit: SignedIn | None) -> Mapping[str, Any]:
    return {
        "visit": visit,
        "may": visit.caller.may if visit is not None else (lambda scope: False),
        "proof": "" if visit is None else visit.proof(),
    }


def error_page(request: Request, visit: SignedIn | None, error: TunepoolError, *, status: int) -> HTMLResponse:
    """What went wrong in a sentence, with the field and the code."""
    return page(request, visit, "error.html", status=status, error=error, code=status)


def hop(request: Request, url: str) -> HTMLResponse:
    """Asks for the address again, from here."""
    return page(request, None, "hop.html", url=url)
