"""Arithmetic over named figures: `calculate_output` of OpenAI's `multi` grader, and the sides of a gate. Pure.

A formula comes from a stranger. It is read into Python's syntax tree. A few kinds of node are allowed and
computed here; nothing is ever evaluated by Python itself. A name may have dots, as `candidate.exact_match`.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, Final

MAX_CHARACTERS: Final = 1000
MAX_NODES: Final = 300

_BINARY: Final[dict[type[ast.operator], Callable[[float, float], float]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,
}
_UNARY: Final[dict[type[ast.unaryop], Callable[[float], float]]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
# Name -> (function, how many arguments it takes at least and at most).
_FUNCTIONS: Final[dict[str, tuple[Callable[..., float], int, int]]] = {
    "min": (min, 2, 100),
    "max": (max, 2, 100),
    "abs": (abs, 1, 1),
    "floor": (math.floor, 1, 1),
    "ceil": (math.ceil, 1, 1),
    "exp": (math.exp, 1, 1),
    "sqrt": (math.sqrt, 1, 1),
    "log": (math.log, 1, 1),
}
KNOWN: Final = f"numbers, names of graders, + - * / ^, parentheses, {', '.join(_FUNCTIONS)}"


class BadFormula(ValueError):
    """The text is no formula. Its words are the end of a sentence for the user."""


class NoNumber(ArithmeticError):
    """The formula has no finite value for these scores: a division by zero, a logarithm of 0, too large a power."""


class Formula:
    """A formula that has been read; `of` computes it.

    Args:
        text: as the user wrote it; `^` is the power.
        names: what it may name; None: anything, which `named` lists.

    Raises:
        BadFormula: the text is no formula, or names something that is not in `names`.
    """

    def __init__(self, text: str, *, names: frozenset[str] | None) -> None:
        self._tree = _tree(text)
        self._names = names
        for node in ast.walk(self._tree):
            self._check(node)
        self.named = _named(self._tree)
        if bare := self.named & _FUNCTIONS.keys() - (names or frozenset()):
            raise BadFormula(f"names the function '{min(bare)}' without its arguments")

    def of(self, scores: Mapping[str, float]) -> float:
        """The value for these scores, one for each name. Raises NoNumber."""
        try:
            value = float(_value(self._tree, scores))
        except (ArithmeticError, ValueError) as error:
            raise NoNumber(str(error)) from None
        if not math.isfinite(value):
            raise NoNumber("the value is not finite")
        return value

    def terms(self) -> dict[str, float]:
        """The factor of each name, and the constant under "", for a sum of names that are multiplied by numbers.

        Raises BadFormula for a formula that is no such sum, NoNumber where a factor has no finite value.
        """
        try:
            return _terms(self._tree)
        except (ArithmeticError, ValueError) as error:
            if isinstance(error, BadFormula):
                raise
            raise NoNumber(str(error)) from None

    def _check(self, node: ast.AST) -> None:
        match node:
            case ast.Constant(value=bool()) | ast.Constant(value=str()) | ast.Constant(value=bytes()):
                raise BadFormula("may hold numbers only, no texts or truth values")
            case ast.Constant(value=int()) | ast.Constant(value=float()) | ast.Load():
                return
            case ast.Name(id=name):
                if self._names is not None and name not in self._names and name not in _FUNCTIONS:
                    raise BadFormula(
                        f"names '{name[:100]}', which is no grader; graders: {', '.join(sorted(self._names))}"
                    )
            case ast.BinOp(op=op) if type(op) in _BINARY:
                return
            case ast.UnaryOp(op=op) if type(op) in _UNARY:
                return
            case ast.Call():
                _check_call(node)
            case ast.operator() | ast.unaryop():
                return  # judged with the node that holds it
            case _:
                raise BadFormula(f"may hold only {KNOWN}")


def _tree(text: str) -> ast.expr:
    if len(text) > MAX_CHARACTERS:
        raise BadFormula(f"may have at most {MAX_CHARACTERS:,} characters")
    if "**" in text:
        raise BadFormula("writes a power as ^")
    try:
        tree = ast.parse(text.strip().replace("^", "**"), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise BadFormula(f"cannot be read; it may hold {KNOWN}") from None
    if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
        raise BadFormula(f"may have at most {MAX_NODES} parts")
    joined: ast.expr = _JoinedNames().visit(tree)
    return joined


class _JoinedNames(ast.NodeTransformer):
    """Makes one name of `a.b.c`. Of anything else, such as `(1).real`, the attribute stays, and is refused."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        inner = self.visit(node.value)
        if isinstance(inner, ast.Name) and inner.id not in _FUNCTIONS:
            return ast.Name(id=f"{inner.id}.{node.attr}", ctx=ast.Load())
        return node


def _check_call(call: ast.Call) -> None:
    if not isinstance(call.func, ast.Name) or call.func.id not in _FUNCTIONS or call.keywords:
        raise BadFormula(f"may call only {', '.join(_FUNCTIONS)}")
    _, least, most = _FUNCTIONS[call.func.id]
    if not least <= len(call.args) <= most:
        count = f"{least}" if least == most else f"at least {least}"
        raise BadFormula(f"gives {call.func.id} {len(call.args)} arguments; it takes {count}")


def _value(node: Any, scores: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Name(id=name):
            return scores[name]
        case ast.BinOp(left=left, op=op, right=right):
            return _BINARY[type(op)](_value(left, scores), _value(right, scores))
        case ast.UnaryOp(op=op, operand=operand):
            return _UNARY[type(op)](_value(operand, scores))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return _FUNCTIONS[name][0](*(_value(argument, scores) for argument in arguments))
    raise AssertionError(f"unchecked node {ast.dump(node)[:100]}")


def _terms(node: Any) -> dict[str, float]:
    match node:
        case ast.Name(id=name):
            return {name: 1.0}
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as op, right=right):
            return _sum(_terms(left), _terms(right), factor=1.0 if isinstance(op, ast.Add) else -1.0)
        case ast.BinOp(left=left, op=ast.Mult(), right=right) if _constant(left) or _constant(right):
            number, rest = (left, right) if _constant(left) else (right, left)
            return _sum({}, _terms(rest), factor=_value(number, {}))
        case ast.BinOp(left=left, op=ast.Div(), right=right) if _constant(right):
            return _sum({}, _terms(left), factor=1.0 / _value(right, {}))
        case ast.UnaryOp(op=op, operand=operand):
            return _sum({}, _terms(operand), factor=-1.0 if isinstance(op, ast.USub) else 1.0)
    if _constant(node):
        return {"": _value(node, {})}
    raise BadFormula("may here only add up names that are multiplied by numbers")


def _constant(node: ast.expr) -> bool:
    return not _named(node)


def _named(tree: ast.expr) -> frozenset[str]:
    called = {id(part.func) for part in ast.walk(tree) if isinstance(part, ast.Call)}
    return frozenset(part.id for part in ast.walk(tree) if isinstance(part, ast.Name) and id(part) not in called)


def _sum(left: dict[str, float], right: dict[str, float], *, factor: float) -> dict[str, float]:
    total = dict(left)
    for name, number in right.items():
        total[name] = total.get(name, 0.0) + factor * number
    return total
