"""Whether a chat template writes each message without a look at later ones, decided from its syntax tree alone.

For such a template one rendering is enough. The text of the first messages is the beginning of the whole, and the
assistant's header is the same after any of them. A template that is not recognised here is rendered once per prefix:
slower, and right for every template.
"""

from __future__ import annotations

import re
from typing import Final

import jinja2
from jinja2 import nodes

MARK: Final = "\0"  # no data row holds it: the check of files refuses it

# As transformers sets it up, without its {% generation %}: templates with that tag are not recognised.
_GRAMMAR = jinja2.Environment(  # noqa: S701 -- parses only
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
)
_END_OF_LOOP = re.compile(r"\{%([-+]?)\s*endfor\b")
_WRITES_MARK = r" if true %}{{ '\x00' }}{% endif %}"

# What a node of these kinds gives follows from what stands below it. Macros, captured blocks, continue, break and the
# like are not among them.
_PLAIN = (
    *(nodes.Output, nodes.TemplateData, nodes.Const, nodes.Name, nodes.NSRef, nodes.If, nodes.For, nodes.Assign),
    *(nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Filter, nodes.Test, nodes.Call, nodes.Keyword, nodes.CondExpr),
    *(nodes.Compare, nodes.Operand, nodes.BinExpr, nodes.UnaryExpr, nodes.Concat),
    *(nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair),
)
_BACKWARD = frozenset({"first", "index", "index0", "previtem"})  # of `loop`: what knows nothing of later messages
_GUARDED = frozenset({"messages", "loop", "self", "add_generation_prompt", "lipsum"})  # lipsum writes by chance
_OF_THE_ROW = frozenset({"messages", "tools", "documents"})


def with_marks(template: str) -> str | None:
    """`template` with MARK written after each message; None when it is not known to be incremental."""
    try:
        tree = _GRAMMAR.parse(template)
        if not _is_incremental(tree):
            return None
        ends = _END_OF_LOOP.finditer(template)
        candidates = (f"{template[: end.start()]}{{%{end[1]}{_WRITES_MARK}{template[end.start() :]}" for end in ends)
        return next((candidate for candidate in candidates if _differs_by_the_mark(candidate, tree)), None)
    except (jinja2.TemplateError, RecursionError):
        return None


def _is_incremental(tree: nodes.Template) -> bool:
    """One loop over the conversation; before, in and after it nothing that depends on how the conversation goes on.

    Holds for conversations of one message and more: the first message may be looked at anywhere before the end.
    """
    aliases = _aliases(tree)
    place = _place_of_loop(tree, aliases)
    if place is None:
        return False
    loop = tree.body[place]
    assert isinstance(loop, nodes.For)
    if loop.test or loop.else_ or loop.recursive or not isinstance(loop.target, nodes.Name):
        return False
    before = [node for node in tree.body[:place] if _alias(node) is None]
    guarded = _GUARDED | aliases
    return all(_looks_back(node, guarded) for node in (*before, loop.target, *loop.body)) and all(
        _is_constant(node, tree) for node in tree.body[place + 1 :]
    )


def _aliases(tree: nodes.Template) -> frozenset[str]:
    return frozenset(alias for node in tree.body if (alias := _alias(node)) is not None)


def _alias(node: nodes.Node) -> str | None:
    """The name that `{% set loop_messages = messages %}` and the like give the conversation."""
    if not (isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name)):
        return None
    return node.target.name if isinstance(node.node, nodes.Name) and node.node.name == "messages" else None


def _place_of_loop(tree: nodes.Template, aliases: frozenset[str]) -> int | None:
    names = {"messages", *aliases}
    loops = [node for node in tree.body if isinstance(node, nodes.For)]
    matching = [loop for loop in loops if isinstance(loop.iter, nodes.Name) and loop.iter.name in names]
    return tree.body.index(matching[0]) if len(matching) == 1 else None


def _looks_back(node: nodes.Node, guarded: frozenset[str], *, inner: bool = False) -> bool:
    """Whether what `node` gives is known once the messages up to the present one are. `inner`: `loop` is another."""
    if _is_first_message(node) or _is_backward(node):
        return True
    if not _is_plain(node):
        return False
    if isinstance(node, nodes.Name):
        return node.name not in guarded or (inner and node.name == "loop" and node.ctx == "load")
    if isinstance(node, nodes.For):
        outside = [part for part in (node.target, node.iter, node.test, *node.else_) if part is not None]
        return all(_looks_back(part, guarded, inner=inner) for part in outside) and all(
            _looks_back(part, guarded, inner=True) for part in node.body
        )
    return all(_looks_back(child, guarded, inner=inner) for child in node.iter_child_nodes())


def _is_plain(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Filter):  # map may be told the name of another filter
        return node.name != "random" and not (node.name == "map" and node.args)
    return isinstance(node, _PLAIN)


def _is_first_message(node: nodes.Node) -> bool:
    return (
        isinstance(node, nodes.Getitem)
        and isinstance(node.node, nodes.Name)
        and node.node.name == "messages"
        and isinstance(node.arg, nodes.Const)
        and node.arg.value == 0
    )


def _is_backward(node: nodes.Node) -> bool:
    return (
        isinstance(node, nodes.Getattr)
        and isinstance(node.node, nodes.Name)
        and node.node.name == "loop"
        and node.attr in _BACKWARD
    )


def _is_constant(node: nodes.Node, tree: nodes.Template) -> bool:
    """Whether `node`, after the loop, gives the same for every row: it may ask for the header, and for nothing else."""
    varying = _OF_THE_ROW | {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"}
    return all(
        _is_plain(part)
        and not isinstance(part, nodes.Call | nodes.For | nodes.Assign)
        and not (isinstance(part, nodes.Name) and part.name in varying)
        for part in (node, *node.find_all(nodes.Node))
    )


def _differs_by_the_mark(template: str, tree: nodes.Template) -> bool:
    """Whether `template` equals that of `tree`, white space included, except for the mark at the end of the body."""
    try:
        marked = _GRAMMAR.parse(template)
    except jinja2.TemplateError:  # that tag stood within a text
        return False
    place = _place_of_loop(marked, _aliases(marked))
    if place is None:
        return False
    loop = marked.body[place]
    assert isinstance(loop, nodes.For)
    (mark,) = _GRAMMAR.parse("{%" + _WRITES_MARK).body
    if not loop.body or loop.body.pop() != mark:
        return False
    return bool(marked == tree)
