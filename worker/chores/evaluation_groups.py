"""Which subjects of an evaluation one program answers for, and the answers that it writes. No database."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from shared.contract.evaluation_run import ITEM_ANSWER, ItemAnswer
from shared.contract.generation import Target
from worker.chores.playground_program import HeldWeights
from worker.host.found_device import FoundDevice
from worker.program.trainer_events import EventTail


@dataclass(frozen=True, slots=True)
class Group:
    """Subjects that one program answers for: places in the request, and a target that names their weights."""

    target: Target
    places: tuple[int, ...]


def groups(targets: tuple[Target, ...], device: FoundDevice) -> list[Group]:
    """Those on the same weights together. A base alone joins adapters on it, stored as they store it. Pure."""
    by_weights: dict[HeldWeights, list[int]] = {}
    plain: list[int] = []
    for place, target in enumerate(targets):
        if target.adapter is None:
            plain.append(place)
        else:
            by_weights.setdefault(HeldWeights.of(target, device), []).append(place)
    for place in plain:
        mine = HeldWeights.of(targets[place], device)
        shared = (held for held in by_weights if _is_on(mine, held))
        by_weights.setdefault(next(shared, mine), []).append(place)
    return [
        Group(next((targets[place] for place in places if targets[place].adapter), targets[places[0]]), tuple(places))
        for places in (sorted(places) for places in by_weights.values())
    ]


def _is_on(base: HeldWeights, held: HeldWeights) -> bool:
    return (base.base, base.revision) == (held.base, held.revision) and not held.alone


class AnswerTail(EventTail):
    """Reads a program's answers as they come; a line that is none is skipped and counted."""

    def answers(self) -> Iterator[ItemAnswer]:
        for line in self.lines():
            try:
                yield ITEM_ANSWER.validate_json(line)
            except ValidationError:
                self.unreadable += 1
