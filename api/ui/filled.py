"""A form that was sent, as its page shows it again: what stood in its fields, and which of them is at fault. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from urllib.parse import unquote

from shared.errors import TunepoolError


@dataclass(frozen=True)
class Filled:
    """What a page knows of the form that was sent to it.

    `action`: the path that the form was sent to; empty: none was sent. `error`: why it was refused; None: it was taken,
    and the page shows it again with what came of it.
    """

    action: str = ""
    fields: Mapping[str, Sequence[str]] = field(default_factory=dict)
    error: TunepoolError | None = None

    @property
    def sent(self) -> bool:
        return bool(self.action)

    def at(self, action: str, names: Mapping[str, str] = MappingProxyType({})) -> FormState:
        """The form with that action. `names`: the fields of parameters that are called otherwise in errors."""
        if not self.sent or unquote(action.partition("?")[0]) != self.action:
            return FormState()
        return FormState(self.fields, self.error, names, sent=True)


@dataclass(frozen=True)
class FormState:
    """One form of a page: empty, or as it was sent."""

    fields: Mapping[str, Sequence[str]] = field(default_factory=dict)
    error: TunepoolError | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    sent: bool = False
    at_fault: str | None = None

    def value(self, name: str, otherwise: str = "") -> str:
        """What stands in a field; `otherwise`: in a form that was not sent."""
        if not self.sent:
            return otherwise
        return next(iter(self.fields.get(name, ())), "")

    def ticked(self, name: str, value: str, otherwise: bool = False) -> bool:
        return value in self.fields.get(name, ()) if self.sent else otherwise

    def fault(self, name: str) -> bool:
        """Whether the error is about this field."""
        if self.error is None:
            return False
        return name == self.at_fault if self.at_fault else name in _named(self.error.param or "", self.names)

    def about(self, field: str | None) -> FormState:
        """The same form, where its page knows better which field the error is about; None: it does not."""
        return replace(self, at_fault=field)

    @property
    def beside(self) -> str:
        """The error's words where its field stands, which needs no naming there."""
        if self.error is None:
            return ""
        named = f"'{self.error.param}'"
        words = self.error.message
        return f"This{words.removeprefix(named)}" if words.startswith(named) else words


def _named(param: str, names: Mapping[str, str]) -> tuple[str, ...]:
    """The names that a field may have for an error to be about it: its own, or the last part, or the first."""
    steps = param.replace("[", ".").replace("]", "").split(".")
    paths = [".".join(steps[:count]) for count in range(len(steps), 0, -1)]
    special = next((names[path] for path in paths if path in names), None)
    if special is not None:
        return (special,)
    words = [step for step in steps if not step.isdigit()]
    return (*words[-1:], *words[:1])
