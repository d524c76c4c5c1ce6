"""The least of PromQL that our rules need, over two scrapes or more (prometheus.io/docs/prometheus/latest/querying).

Strict where it matters to a rule: a counter that has only one sample in its range has no increase. Increases are not
extrapolated to the ends of the range, which changes no comparison with zero.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import promql_parser as promql

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
Samples = Mapping[str, Mapping[Labels, float]]

_COMPARE: Final[dict[str, Callable[[float, float], bool]]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
}
_RECKON: Final[dict[str, Callable[[float, float], float]]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": lambda left, right: left / right if right else math.nan,
}


@dataclass(frozen=True)
class Scrape:
    """What was told at a moment, in seconds."""

    at: float
    samples: Samples


def holds(query: str, scrapes: Sequence[Scrape]) -> Vector:
    """The series for which `query` holds at the last scrape; a rule fires when there is one."""
    value = _value(promql.parse(query), scrapes)
    assert isinstance(value, dict), "a rule asks for series"
    return value


def _value(node: Any, scrapes: Sequence[Scrape]) -> Vector | float:
    match node:
        case promql.NumberLiteral():
            return float(node.val)
        case promql.ParenExpr():
            return _value(node.expr, scrapes)
        case promql.VectorSelector():
            return _selected(node, scrapes[-1])
        case promql.AggregateExpr():
            return _sum(node, scrapes)
        case promql.Call():
            return _call(node, scrapes)
        case promql.BinaryExpr():
            return _both(node, scrapes)
    raise AssertionError(f"no rule of ours has a {type(node).__name__} yet: teach it here")


def _selected(node: Any, scrape: Scrape) -> Vector:
    return {
        labels: value for labels, value in scrape.samples.get(node.name, {}).items() if _matches(node, dict(labels))
    }


def _matches(node: Any, labels: Mapping[str, str]) -> bool:
    for matcher in node.matchers.matchers:
        value, kind = labels.get(matcher.name, ""), str(matcher.op)
        same = matcher.value == value if "Equal" in kind else re.fullmatch(matcher.value, value) is not None
        if same == ("Not" in kind):
            return False
    return True


def _sum(node: Any, scrapes: Sequence[Scrape]) -> Vector:
    assert str(node.op) == "sum", node.op
    by = set() if node.modifier is None else set(node.modifier.labels)
    grouped: Vector = {}
    inner = _value(node.expr, scrapes)
    assert isinstance(inner, dict)
    for labels, value in inner.items():
        group = frozenset(label for label in labels if label[0] in by)
        grouped[group] = grouped.get(group, 0.0) + value
    return grouped


def _call(node: Any, scrapes: Sequence[Scrape]) -> Vector:
    name = node.func.name
    if name == "absent":
        return {} if _value(node.args[0], scrapes) else {frozenset(): 1.0}
    if name == "histogram_quantile":
        return _quantile(node.args[0].val, _value(node.args[1], scrapes))
    assert name in {"increase", "rate"}, name
    matrix = node.args[0]
    selector, seconds = matrix.vector_selector, matrix.range.total_seconds()
    series: dict[Labels, list[float]] = {}
    for scrape in scrapes:
        if scrapes[-1].at - seconds < scrape.at:
            for labels, value in _selected(selector, scrape).items():
                series.setdefault(labels, []).append(value)
    grown = {labels: _increase(values) for labels, values in series.items() if len(values) > 1}
    return grown if name == "increase" else {labels: value / seconds for labels, value in grown.items()}


def _increase(values: Sequence[float]) -> float:
    return sum(after - before if after >= before else after for before, after in pairwise(values))


def _quantile(part: float, value: Vector | float) -> Vector:
    """Of one histogram: linear within the bucket, as Prometheus does."""
    assert isinstance(value, dict)
    buckets = sorted((float(dict(labels)["le"].replace("+Inf", "inf")), count) for labels, count in value.items())
    if not buckets or not buckets[-1][1]:
        return {}
    rank, below, so_far = part * buckets[-1][1], 0.0, 0.0
    for bound, count in buckets:
        if count >= rank:
            if bound == math.inf:
                return {frozenset(): below}
            return {frozenset(): below + (bound - below) * (rank - so_far) / ((count - so_far) or 1.0)}
        below, so_far = bound, count
    raise AssertionError("the last bucket has all")


def _both(node: Any, scrapes: Sequence[Scrape]) -> Vector | float:
    kind = str(node.op)
    left, right = _value(node.lhs, scrapes), _value(node.rhs, scrapes)
    if kind in {"and", "or"}:
        assert isinstance(left, dict)
        assert isinstance(right, dict)
        everything = node.modifier is not None and node.modifier.matching is not None  # our rules say `on()` only
        if kind == "or":
            return {**right, **left}
        return {labels: value for labels, value in left.items() if (right if everything else labels in right)}
    if isinstance(left, float) and isinstance(right, float):
        return _RECKON[kind](left, right)
    pairs = _pairs(left, right)
    if kind in _COMPARE:
        return {labels: one for labels, (one, other) in pairs.items() if _COMPARE[kind](one, other)}
    return {labels: _RECKON[kind](one, other) for labels, (one, other) in pairs.items()}


def _pairs(left: Vector | float, right: Vector | float) -> dict[Labels, tuple[float, float]]:
    if isinstance(left, dict) and isinstance(right, dict):
        return {labels: (value, right[labels]) for labels, value in left.items() if labels in right}
    if isinstance(left, dict):
        assert isinstance(right, float)
        return {labels: (value, right) for labels, value in left.items()}
    assert isinstance(right, dict)
    assert isinstance(left, float)
    return {labels: (left, value) for labels, value in right.items()}
