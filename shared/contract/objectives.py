"""The table of objectives and of all that differs between them. Pure.

A new objective is a class in `shared/contract/spec.py`, a row here, a loss in `worker/train/objectives/` and a line in
its `table.py`. Nobody else asks for an objective by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from shared.contract.spec import Format, ObjectiveName


@dataclass(frozen=True)
class EpochRule:
    """How many epochs files below so many rows get, and why. `below` is None in the last rule."""

    below: int | None
    epochs: int
    reason: str  # may name {rows}


@dataclass(frozen=True)
class ObjectiveFacts:
    """What everybody outside the loss has to know of an objective.

    Attributes:
        formats: the kinds of rows that it reads.
        remedy: how a user asks for it, as the end of a sentence.
        sequences: sequences of one row that are in a forward pass with gradient at the same time.
        may_pack: rows may share a sequence, and the user chooses which of their tokens carry loss.
        learning_rate_factor: relative to next-token training, with `learning_rate_reason`.
        epochs: the first rule that a file meets decides.
        least_batch: rows that a step needs at least, with `batch_reason`.
        needs_reference: compares with the model as it was, which is the base with the adapter switched off.
        guess_bounds_loss: the loss is nats per token, so one far above that of a guess means divergence.
        asked, choose: the row of docs/methods.md.
    """

    formats: tuple[Format, ...]
    remedy: str
    sequences: int
    may_pack: bool
    learning_rate_factor: float
    learning_rate_reason: str
    epochs: tuple[EpochRule, ...]
    least_batch: int
    batch_reason: str
    needs_reference: bool
    guess_bounds_loss: bool
    asked: str
    choose: str

    def epochs_for(self, rows: int) -> tuple[int, str]:
        """Epochs for a file of so many rows, and why."""
        rule = next(rule for rule in self.epochs if rule.below is None or rows < rule.below)
        return rule.epochs, rule.reason.format(rows=rows)


_PREFERENCE_EPOCHS: Final = (
    EpochRule(2000, 2, "preferences, below 2,000 rows"),
    EpochRule(None, 1, "preferences overfit after one epoch"),
)

OBJECTIVES: Final[dict[ObjectiveName, ObjectiveFacts]] = {
    "supervised": ObjectiveFacts(
        formats=("chat", "prompt_completion", "text"),
        remedy="use method.type supervised",
        sequences=1,
        may_pack=True,
        learning_rate_factor=1.0,
        learning_rate_reason="",
        epochs=(
            EpochRule(2000, 3, "{rows} rows: below 2,000"),
            EpochRule(50_001, 2, "{rows} rows: 2,000 to 50,000"),
            EpochRule(None, 1, "{rows} rows: above 50,000"),
        ),
        least_batch=1,
        batch_reason="",
        needs_reference=False,
        guess_bounds_loss=True,
        asked="`method.type` `supervised`, or nothing",
        choose="examples of what to say; text rows go on with pre-training",
    ),
    "dpo": ObjectiveFacts(
        formats=("preference",),
        remedy="set method.type to dpo",
        sequences=2,
        may_pack=False,
        learning_rate_factor=0.05,
        learning_rate_reason="takes a twentieth",
        epochs=_PREFERENCE_EPOCHS,
        least_batch=1,
        batch_reason="",
        needs_reference=True,
        guess_bounds_loss=False,
        asked="`method.type` `dpo`; `beta` 0.1",
        choose="two answers, one better than the other; two sequences and a second pass without gradient per row",
    ),
    "kto": ObjectiveFacts(
        formats=("kto",),
        remedy="set tunepool.objective to {'type': 'kto'}",
        sequences=1,
        may_pack=False,
        learning_rate_factor=0.05,
        learning_rate_reason="takes a twentieth",
        epochs=_PREFERENCE_EPOCHS,
        least_batch=2,
        batch_reason="compares the rows of a step with each other",
        needs_reference=True,
        guess_bounds_loss=False,
        asked="`method.type` `kto`; `beta` 0.1",
        choose="thumbs up or down without pairs; three sequences per row, two rows a step at least",
    ),
    "orpo": ObjectiveFacts(
        formats=("preference",),
        remedy="set method.type to orpo",
        sequences=2,
        may_pack=False,
        # It is also the only training that the model gets: TRL's example takes 8e-5 with LoRA, where dpo's takes 5e-6.
        learning_rate_factor=0.4,
        learning_rate_reason="takes two fifths",
        epochs=_PREFERENCE_EPOCHS,
        least_batch=1,
        batch_reason="",
        needs_reference=False,
        guess_bounds_loss=False,
        asked="`method.type` `orpo`; `beta` 0.1",
        choose="pairs on a plain base, without supervised training before; two sequences per row, no reference pass",
    ),
    "simpo": ObjectiveFacts(
        formats=("preference",),
        remedy="set method.type to simpo",
        sequences=2,
        may_pack=False,
        learning_rate_factor=0.05,
        learning_rate_reason="takes a twentieth",
        epochs=_PREFERENCE_EPOCHS,
        least_batch=1,
        batch_reason="",
        needs_reference=False,
        guess_bounds_loss=False,
        asked="`method.type` `simpo`; `beta` 2, `gamma` 1",
        choose="answers win by what each token is worth, not by length; two sequences per row, no reference pass",
    ),
}


def objectives(*, needs_reference: bool | None = None, may_pack: bool | None = None) -> tuple[ObjectiveName, ...]:
    """Names of the objectives that are so, in the order of the table."""
    return tuple(
        name
        for name, facts in OBJECTIVES.items()
        if needs_reference in (None, facts.needs_reference) and may_pack in (None, facts.may_pack)
    )
