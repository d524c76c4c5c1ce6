"""The arithmetic of OpenAI's `multi` grader: `calculate_output`, a formula over the scores of named graders. Pure.

A formula comes from a stranger. It is read into Python's syntax tree, of which a few kinds of node are allowed and
computed here; nothing is ever evaluated by Python itself.
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

    Raises:
        BadFormula: the text is no formula, or names something that is not in `names`.
    """

    def __init__(self, text: str, *, names: frozenset[str]) -> None:
        self._tree = _tree(text)
        self._names = names
        for node in ast.walk(self._tree):
            self._check(node)

    def of(self, scores: Mapping[str, float]) -> float:
        """The value for these scores, one for each name. Raises NoNumber."""
        try:
            value = float(_value(self._tree, scores))
        except (ArithmeticError, ValueError) as error:
            raise NoNumber(str(error)) from None
        if not math.isfinite(value):
            raise NoNumber("the value is not finite")
        return value

    def _check(self, node: ast.AST) -> None:
        match node:
            case ast.Constant(value=bool()) | ast.Constant(value=str()) | ast.Constant(value=bytes()):
                raise BadFormula("may hold numbers only, no texts or truth values")
            case ast.Constant(value=int()) | ast.Constant(value=float()) | ast.Load():
                return
            case ast.Name(id=name):
                if name not in self._names and name not in _FUNCTIONS:
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
    return tree


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
