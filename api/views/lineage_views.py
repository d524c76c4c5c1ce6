"""A lineage on the wire: things and the arrows between them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from api.views.view import View
from shared.products.lineage import Kind, Lineage, Relation


class LineageNodeView(View):
    id: str
    kind: Kind
    name: str = Field(description="A file's name, a model's `ft:` name, a push's repository, an alias; else the id.")
    gone: bool = Field(description="It has been deleted since.")
    facts: dict[str, Any] = Field(
        description="Of a file: sha256, bytes, rows; of a job: status, metadata; of an export: format."
    )


class LineageEdgeView(View):
    """`source` went into `target`."""

    source: str
    target: str
    relation: Relation
    current: bool = Field(description="False: an alias has named it, and names another model now.")


class LineageView(View):
    id: str
    object: Literal["tunepool.lineage"] = "tunepool.lineage"
    nodes: list[LineageNodeView]
    edges: list[LineageEdgeView]
    truncated: bool


def lineage(traced: Lineage) -> LineageView:
    return LineageView(
        id=traced.start.id,
        nodes=[
            LineageNodeView(id=node.id, kind=node.kind, name=node.name, gone=node.gone, facts=node.facts)
            for node in traced.nodes.values()
        ],
        edges=[
            LineageEdgeView(source=edge.source, target=edge.target, relation=edge.relation, current=edge.current)
            for edge in traced.edges
        ],
        truncated=traced.truncated,
    )
