"""How a sweep is shown: rows of a table, Markdown for a summary, and a picture of the curves."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final
from xml.etree import ElementTree

from tunepool.pipeline.curves import BARS
from tunepool.printing import markdown_text, printable

COLUMNS: Final = ("trial", "state", "settings", "value", "step", "device_seconds", "looks", "job")
WIDTH, HEIGHT, EDGE = 720, 400, 48
SHOWN_LOOKS: Final = 12
COLOURS: Final = {"best": "#0a7d38", "succeeded": "#2f6fb0", "stopped": "#b0b0b0"}


def rows(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each trial: the best first, then by value, then those without one."""
    spread = [value for trial in sweep["trials"] for _, value in trial["looks"] if value is not None]
    sign = 1 if sweep["better"] == "lower" else -1

    def place(trial: dict[str, Any]) -> tuple[bool, bool, float]:
        value = trial["value"]
        return trial["number"] != sweep["best"], value is None, 0.0 if value is None else sign * value

    return [_row(trial, sweep, spread) for trial in sorted(sweep["trials"], key=place)]


def _row(trial: dict[str, Any], sweep: dict[str, Any], spread: list[float]) -> dict[str, Any]:
    return {
        "trial": f"{trial['number']}{' *' if trial['number'] == sweep['best'] else ''}",
        "state": trial["state"],
        "settings": ", ".join(
            f"{name.rpartition('.')[2]}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in trial["parameters"].items()
        ),
        "value": None if trial["value"] is None else f"{trial['value']:.6g}",
        "step": trial["step"],
        "device_seconds": f"{trial['device_seconds']:.1f}",
        "looks": bars([value for _, value in trial["looks"] if value is not None], spread),
        "job": trial["job"],
        "why": trial["reason"] or (trial["error"] or {}).get("message"),
    }


def bars(values: list[float], spread: Iterable[float]) -> str:
    """The last looks as bars between the least and the greatest value of the whole sweep."""
    known = list(spread)
    if not values:
        return ""
    least, greatest = min(known), max(known)
    width = greatest - least or 1.0
    return "".join(BARS[round((value - least) / width * (len(BARS) - 1))] for value in values[-SHOWN_LOOKS:])


def head(sweep: dict[str, Any]) -> str:
    """One sentence: how many trials are in which state, and what it has cost."""
    counts = ", ".join(f"{count} {state}" for state, count in sweep["trial_counts"].items())
    budget = sweep["request"].get("budget_device_seconds")
    of = f" of {budget:g}" if budget else ""
    return f"{sweep['id']} is {sweep['status']}: {counts}; {sweep['device_seconds']:.1f}{of} device-seconds"


def markdown(sweep: dict[str, Any]) -> str:
    lines = [f"### Sweep: {sweep['measure']}, {sweep['better']} is better", "", head(sweep), ""]
    lines += ["| trial | settings | state | value | looks | device-seconds | why |", "|---|---|---|---|---|---|---|"]
    for row in rows(sweep):
        cells = (row[name] for name in ("trial", "settings", "state", "value", "looks", "device_seconds", "why"))
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return "\n".join([*lines, ""])


def _cell(value: object) -> str:
    return "-" if value is None else markdown_text(str(value))


def picture(sweep: dict[str, Any]) -> bytes:
    """An SVG of every trial's looks over its steps; the best is the thick line, comparisons are dashed."""
    points = [(step, value) for trial in sweep["trials"] for step, value in trial["looks"] if value is not None]
    last = max((step for step, _ in points), default=1)
    values = [value for _, value in points] or [0.0]
    low, high = min(values), max(values)
    size = {"width": str(WIDTH), "height": str(HEIGHT), "viewBox": f"0 0 {WIDTH} {HEIGHT}"}
    root = ElementTree.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **size})
    ElementTree.SubElement(root, "rect", width="100%", height="100%", fill="white")

    def x(step: float) -> str:
        return f"{EDGE + step / last * (WIDTH - 2 * EDGE):.1f}"

    def y(value: float) -> str:
        return f"{HEIGHT - EDGE - (value - low) / (high - low or 1.0) * (HEIGHT - 2 * EDGE):.1f}"

    for rung in sweep["rungs"]:
        if rung <= last:
            ends = {"x1": x(rung), "x2": x(rung), "y1": str(EDGE), "y2": str(HEIGHT - EDGE)}
            ElementTree.SubElement(root, "line", stroke="#dddddd", attrib={**ends, "stroke-dasharray": "4 4"})
    for trial in sorted(sweep["trials"], key=lambda trial: trial["number"] == sweep["best"]):
        line = [f"{x(step)},{y(value)}" for step, value in trial["looks"] if value is not None]
        if line:
            best = trial["number"] == sweep["best"]
            colour = COLOURS["best"] if best else COLOURS.get(trial["state"], COLOURS["stopped"])
            style = {"fill": "none", "stroke": colour, "stroke-width": "3" if best else "1.2"}
            drawn = ElementTree.SubElement(root, "polyline", points=" ".join(line), attrib=style)
            name = f"trial {trial['number']}: {', '.join(f'{n}={v}' for n, v in trial['parameters'].items())}"
            ElementTree.SubElement(drawn, "title").text = printable(name)
    for left, top, words in (
        (EDGE, EDGE - 14, f"{sweep['measure']} ({sweep['better']} is better)"),
        (4, EDGE, f"{high:.4g}"),
        (4, HEIGHT - EDGE, f"{low:.4g}"),
        (WIDTH - EDGE - 40, HEIGHT - EDGE + 20, f"step {last}"),
    ):
        style = {"font-size": "12", "font-family": "sans-serif"}
        ElementTree.SubElement(root, "text", x=str(left), y=str(top), attrib=style).text = words
    written: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return written
