"""`tunepool lineage`: what a model was made of and what was made of it, as two trees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from tunepool import native
from tunepool.printing import json_line, printable


def lineage(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A file, job, model, merge, combination, export, push or alias.")],
) -> None:
    """Print the way from data to adapter, merge and alias, from NAME in both directions."""
    answer = native.get(context, f"lineage/{native.part(name)}")
    print(json_line(answer) if context.obj.as_json else printable("\n".join(lines(answer))))


def lines(answer: dict[str, Any]) -> Iterator[str]:
    """The thing asked for, below it what it was made of, then what was made of it."""
    nodes = {node["id"]: node for node in answer["nodes"]}
    yield _told(nodes[answer["id"]])
    for title, here, there in (("made of", "target", "source"), ("made into", "source", "target")):
        branches = list(_branches(answer, nodes, answer["id"], (here, there), depth=1, seen={answer["id"]}))
        if branches:
            yield f"{title}:"
            yield from branches
    if answer["truncated"]:
        yield "… and more: this is a part of it."


def _branches(
    answer: dict[str, Any],
    nodes: dict[str, Any],
    node_id: str,
    ends: tuple[str, str],
    *,
    depth: int,
    seen: set[str],
) -> Iterator[str]:
    """A thing that stands at several places is followed at the first."""
    here, there = ends
    for edge in answer["edges"]:
        if edge[here] != node_id:
            continue
        other = edge[there]
        earlier = "" if edge["current"] else ", earlier"
        yield f"{'  ' * depth}{_told(nodes[other])}  ({edge['relation'].replace('_', ' ')}{earlier})"
        if other not in seen:
            seen.add(other)
            yield from _branches(answer, nodes, other, ends, depth=depth + 1, seen=seen)


def _told(node: dict[str, Any]) -> str:
    same = node["name"] == node["id"] or node["kind"] == "base_model"
    words = [node["kind"].replace("_", " "), node["name"], *([] if same else [node["id"]])]
    rows = [f"{node['facts']['rows']} rows"] if node["facts"].get("rows") else []
    made = [f"{node['facts']['format']} {node['facts']['quantization']}"] if node["facts"].get("format") else []
    return ", ".join([" ".join(words), *rows, *made, *(["deleted"] if node["gone"] else [])])
