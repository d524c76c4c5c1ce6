"""Ranks started by the very launcher that a supervisor uses, and how tests wait for them."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shared.contract.spec import AttemptSpec
from shared.operating.isolation import measured_isolation
from shared.settings import Settings
from tests.patience import patience
from worker.program import launcher, processes
from worker.program.launcher import Meeting, Trainer

PATIENCE = 150.0  # for starting two interpreters with the training stack on a busy machine
TESTS = Path(__file__).parents[1]  # the programs that tests start
FORKED = "tests.train.forked_gang"  # for tests of what ranks do; how they are started others test


@contextlib.contextmanager
def starter(folder: Path, temporary_files: Path) -> Iterator[Callable[..., Trainer]]:
    """Starts trainers as a supervisor would; proves them dead afterwards, and that they left nothing behind.

    folder: their specs and OUTs lie below it.
    """
    started: list[Trainer] = []
    before = set(temporary_files.iterdir())

    def begin(
        spec_file: Path,
        out: Path,
        *,
        meeting: Meeting | None = None,
        module: str = "worker.train",
        gang: str = launcher.GANG,
    ) -> Trainer:
        out.mkdir(exist_ok=True)
        spec = AttemptSpec.model_validate_json(spec_file.read_bytes())
        walls = measured_isolation(Settings(home=folder / "home", trainer_uid=0))
        tag = processes.own_tag(home=out, job_id=spec.job_id, fence=len(started))
        placement = spec.job.placement
        trainer = launcher.start(
            launcher.command(module, placement=placement, spec_file=spec_file, out=out, meeting=meeting, gang=gang),
            environment=launcher.environment(tag=tag, device_ids=("h:cpu",), kind="cpu", threads=1, scratch=out),
            tag=tag,
            out=out,
            log_file=out / "log",
            # `one_after_another` writes beside its folder.
            isolation=walls if module == "worker.train" else dataclasses.replace(walls, files="open"),
            company="ranks_here" if meeting is None else "ranks_elsewhere",
            reads=(folder, Path(spec.base_model_path), TESTS),
        )
        started.append(trainer)
        return trainer

    try:
        yield begin
    finally:
        for trainer in started:
            trainer.end(grace_seconds=0)
    assert set(temporary_files.iterdir()) == before


def until(holds: Callable[[], Any], *, seconds: float = PATIENCE) -> Any:
    deadline = time.monotonic() + patience(seconds)
    while not (found := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def ended(trainer: Trainer, *, seconds: float = PATIENCE) -> tuple[int, str]:
    """Exit code and last words of a trainer that ends by itself."""
    until(lambda: trainer.poll() is not None, seconds=seconds)
    exit_ = trainer.end(grace_seconds=0)
    return exit_.code, exit_.last_words


def over_two(strategy: str, **settings: Any) -> dict[str, Any]:
    return {**settings, "placement": {"strategy": strategy, "gpus": 2}}
