"""How each base model of a catalogue stands: resolving, ready or in error, and the sentence that goes with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from shared.contract.base_facts import ModelFacts
from shared.contract.model_description import ModelDescription
from shared.errors import NotFound
from shared.settle.catalogue import SMOLLM2, Catalogue
from shared.settle.wanted_models import HubAnswer

State = Literal["resolving", "ready", "error"]
Origin = Literal["built_in", "models.toml", "added"]
OWNER = "organization"


@dataclass(frozen=True, slots=True)
class BaseModelStatus:
    """The state of one base model, for people. What is not known yet is None."""

    name: str
    state: State
    detail: str | None  # what to do, or what holds it up
    origin: Origin
    source: str | None
    locator: str | None
    revision: str | None  # as asked
    commit: str | None  # as pinned; of the built-in model the sha256 of its file
    aliases: tuple[str, ...]
    created: int
    owned_by: str
    looked_at: int | None
    facts: ModelFacts | None
    description: ModelDescription | None = None  # what a program of the trainer tells of it


def standings(catalogue: Catalogue) -> list[BaseModelStatus]:
    """Every base model by name, also those that cannot be used. An alias is shown with the model that it names."""
    names = {*catalogue.entries, *catalogue.pending, *catalogue.problems} - set(catalogue.aliases)
    return [_standing(catalogue, name) for name in sorted(names)]


def standing(catalogue: Catalogue, name: str) -> BaseModelStatus:
    """The base model that this name, alias, repository or folder stands for. Raises NotFound."""
    known = catalogue.name_of(name)
    if not catalogue.taken(known):
        raise NotFound(
            f"No base model '{name[:100]}' in this installation's catalogue. `GET /v1/tunepool/models` lists them.",
            param="name",
            code="model_not_found",
        )
    return _standing(catalogue, known)


def under_every_name(catalogue: Catalogue) -> Iterator[tuple[str, BaseModelStatus]]:
    """(name, standing) of all that `model` may name: aliases stand beside what they name."""
    for standing in standings(catalogue):
        for name in (standing.name, *standing.aliases):
            yield name, standing


def _standing(catalogue: Catalogue, name: str) -> BaseModelStatus:
    entry, asked, answer = catalogue.entries.get(name), catalogue.asked.get(name), catalogue.answers.get(name)
    pinned = None if entry is None or entry.ref.source == "path" else entry.ref.revision
    return BaseModelStatus(
        name=name,
        state=_state(catalogue, name),
        detail=_detail(catalogue, name),
        origin=_origin(catalogue, name),
        source=asked.source if asked else entry.ref.source if entry else None,
        locator=asked.locator if asked else entry.locator if entry else None,
        revision=(asked.revision or None) if asked else pinned,
        commit=pinned,
        aliases=tuple(sorted(alias for alias, target in catalogue.aliases.items() if target == name)),
        created=asked.created if asked else entry.created if entry else 0,
        owned_by=asked.owned_by if asked else entry.owned_by if entry else OWNER,
        looked_at=(answer.looked_at or None) if answer else None,
        facts=entry.ref.facts if entry else None,
        description=_description(answer),
    )


def _description(answer: HubAnswer | None) -> ModelDescription | None:
    """None too where another version wrote it."""
    if answer is None or answer.description is None:
        return None
    try:
        return ModelDescription.model_validate(answer.description)
    except ValidationError:
        return None


def _state(catalogue: Catalogue, name: str) -> State:
    if name in catalogue.entries:
        return "ready"
    return "resolving" if name in catalogue.pending else "error"


def _detail(catalogue: Catalogue, name: str) -> str | None:
    if name in catalogue.pending:
        pending = catalogue.pending[name]
        return f"A worker reads the config.json of {pending.wanted}. {pending.note}".rstrip()
    if name in catalogue.problems:
        return catalogue.problems[name]
    answer = catalogue.answers.get(name)
    return (answer.note or None) if answer else None


def _origin(catalogue: Catalogue, name: str) -> Origin:
    if name in catalogue.added:
        return "added"
    return "built_in" if catalogue.entries.get(name) is SMOLLM2 else "models.toml"
