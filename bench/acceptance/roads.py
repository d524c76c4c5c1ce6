"""What each faster road of the trainer brings: the same job with all of them, and with each left out in turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, get_args

from bench.acceptance.laboratory import SHAPES, Check, Clock, Laboratory, Outcome, Shape, farthest, within
from bench.acceptance.sections import real
from shared.contract.events import EXIT_DONE
from shared.contract.spec import FastRoad

# Other orders of summation in bfloat16: two runs on a GPU differ by as much.
_LIKE: Final = 0.02
_SAVING: Final[FastRoad] = "background_saving"


def roads(lab: Laboratory, clock: Clock) -> Iterator[Check]:
    """Tokens per second with every road, without each of them, and by how many layers recompute; what saving costs."""
    shape: Shape = lab.shapes()[0]
    every = _run(lab, clock, "all_roads", shape=shape)
    yield _rate("all_roads", every)
    for road in get_args(FastRoad):
        if road == _SAVING:  # nothing is saved here before the last step
            continue
        clock.check()
        left_out = _run(lab, clock, f"without_{road}", shape=shape, without=[road])
        yield _rate(f"without_{road}", left_out, beside=every)
        yield within(f"without_{road}_curve", farthest(left_out.losses, every.losses), _LIKE)
    layers = SHAPES[shape][2]
    for count in (layers // 2, layers):
        clock.check()
        again = _run(lab, clock, f"recomputed_{count}", shape=shape, recomputed=count)
        yield _rate(f"recomputed_{count}", again, beside=every)
        yield Check(f"recomputed_{count}_peak_bytes", _peak(again), "fewer than with none", _saves(lab, again, every))
    yield from _saving(lab, clock, shape=shape)


def _saving(lab: Laboratory, clock: Clock, *, shape: Shape) -> Iterator[Check]:
    """Seconds from the end of a step to the end of the next, with a checkpoint between: beside the step, or before."""
    curves = []
    for name, without in ((f"with_{_SAVING}", []), (f"without_{_SAVING}", [_SAVING])):
        clock.check()
        ended = _run(lab, clock, name, shape=shape, without=without, training={"save_steps": 1})
        curves.append(ended.losses)
        seconds = _seconds_between_steps(ended) if ended.code == EXIT_DONE else ended.words
        yield Check(f"{name}_seconds_of_a_saved_step", seconds, "exit 0", ended.code == EXIT_DONE)
    yield within(f"without_{_SAVING}_curve", farthest(*curves), _LIKE)


def _seconds_between_steps(ended: Outcome) -> float:
    """Of the first step that follows a checkpoint."""
    first, second = [event.time for event in ended.events if event.type == "metrics"][:2]
    return float(second - first)


def _run(
    lab: Laboratory,
    clock: Clock,
    name: str,
    *,
    shape: Shape,
    recomputed: int | None = None,
    training: dict[str, Any] | None = None,
    **parts: Any,
) -> Outcome:
    parts |= real(lab, rows=128, **(training or {}))
    parts |= {"gradient_checkpointing": recomputed is not None, "gradient_checkpointing_layers": recomputed}
    # On a processor in this process: the import alone takes longer than the run.
    if lab.small:
        return lab.train(name, shape=shape, **parts)
    return lab.train_apart(name, shape=shape, clock=clock, **parts)


def _rate(name: str, ended: Outcome, *, beside: Outcome | None = None) -> Check:
    if ended.code != EXIT_DONE:
        return Check(f"{name}_tokens_per_second", ended.words, "exit 0", ok=False)
    figures = {"tokens_per_second": _tokens_per_second(ended)}
    if beside is not None and beside.code == EXIT_DONE:
        figures["of_all_roads"] = _tokens_per_second(ended) / _tokens_per_second(beside)
    return Check(f"{name}_tokens_per_second", figures)


def _tokens_per_second(ended: Outcome) -> float:
    done = ended.last("finished")
    return float(done.trained_tokens / done.train_seconds)


def _peak(ended: Outcome) -> int | None:
    return int(ended.last("finished").peak_memory_bytes) if ended.code == EXIT_DONE else None


def _saves(lab: Laboratory, again: Outcome, every: Outcome) -> bool | None:
    """None on a processor: there the peak is that of the whole program."""
    least, most = _peak(again), _peak(every)
    return None if lab.small or least is None or most is None else least < most
