"""How many tickets the demo learns from: all of them, or as many as this machine trains on in a few minutes."""

from __future__ import annotations

from typing import Final

BATCH: Final = 5
# Held-out messages that were answered with exactly the right ticket, by the number of tickets learnt from (README).
RIGHT: Final[dict[int, str]] = {480: "100 %", 160: "100 %"}
ALL: Final = max(RIGHT)
TRAINING_SECONDS: Final = 240.0


def tickets_for(step_seconds: float) -> int:
    """The most that are trained on in time; the fewest of the table where no number is."""
    fitting = (
        tickets for tickets in sorted(RIGHT, reverse=True) if _seconds(tickets, step_seconds) <= TRAINING_SECONDS
    )
    return next(fitting, min(RIGHT))


def fewer(step_seconds: float) -> int | None:
    """How many instead of all; None: all of them are trained on in time."""
    chosen = tickets_for(step_seconds)
    return chosen if chosen < ALL else None


def words(step_seconds: float, tickets: int) -> str:
    """Why fewer, and what it costs."""
    return (
        f"A step takes {step_seconds:.1f} s on this machine: {ALL} tickets would take "
        f"{_seconds(ALL, step_seconds) / 60:.0f} minutes. The demo starts again with {tickets} of them, about "
        f"{max(1.0, _seconds(tickets, step_seconds) / 60):.0f} minutes. Where this was tried, {RIGHT[tickets]} of the "
        f"held-out messages were then answered with exactly the right ticket; with all, {RIGHT[ALL]}."
    )


def _seconds(tickets: int, step_seconds: float) -> float:
    return tickets / BATCH * step_seconds
