"""The optimizer loop. Forward and backward per micro-batch, one update per step, a look, a checkpoint.

The loop is ours and not `Trainer.train`: a step here has as many forward passes as its rows need when packed, stops
between any two steps, and resumes from state without pickles. The loss, the model's preparation, the optimizer, the
schedule and the arithmetic's precision are TRL's and transformers'.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from transformers import Trainer

from shared.contract.events import CheckpointSaved, Metrics, Validation
from shared.contract.methods import METHODS
from shared.contract.objectives import OBJECTIVES
from shared.contract.spec import AttemptSpec
from worker.train import checkpoints
from worker.train.answer_look import AnswerLook, Scores
from worker.train.best_step import note_validation
from worker.train.checkpoints import Progress, TrainingState
from worker.train.data import Row
from worker.train.guards import check_divergence, check_numbers
from worker.train.memory import held_memory_bytes
from worker.train.objectives.objective import Objective
from worker.train.packing import StepPlan
from worker.train.ranks import Ranks
from worker.train.reporting import Reporter
from worker.train.stack_faults import refused_for_good
from worker.train.stopping import StoppedOnRequest, StopRequest
from worker.train.validation import Evaluator, Sums, Tally, passes

# Between two checkpoints, where none is asked for by steps: a crash costs no more. Longer where saving itself is long.
SAVE_SECONDS: Final = 1800.0
SAVE_SHARE: Final = 0.05


@dataclass(frozen=True)
class Schedule:
    """After which steps something else happens."""

    evaluate_every: int
    save_every: int | None
    log_every: int

    @staticmethod
    def of(spec: AttemptSpec, *, total_steps: int) -> Schedule:
        training = spec.job.training
        return Schedule(
            evaluate_every=training.eval.steps or max(1, total_steps // 4),
            save_every=training.save_steps,
            log_every=training.logging_steps,
        )


@dataclass(frozen=True)
class LastLook:
    """The last pass over the validation rows: after which step, what came of it, and whether all rows were read."""

    step: int
    tally: Tally
    full: bool


@dataclass(frozen=True)
class BeingSaved:
    """A checkpoint that a thread brings to the disk while further steps are taken."""

    place: Future[Path]
    began: float
    figures: dict[str, Any]  # of its event
    best_step: int | None  # when it was taken


@dataclass
class TrainingRun:
    """Everything one attempt works on."""

    spec: AttemptSpec
    out: Path
    objective: Objective
    evaluator: Evaluator
    answers: AnswerLook | None
    learner: TrainingState
    plan: StepPlan
    progress: Progress
    train_rows: Sequence[Row]
    validation_rows: Sequence[Row]
    reporter: Reporter
    stop: StopRequest
    ranks: Ranks
    write_adapter: Callable[[Path], None]
    clock: Callable[[], float] = time.monotonic
    # Means since the last Metrics event; and the last figures, which a checkpoint carries along.
    window: Tally = field(default_factory=Tally)
    window_seconds: float = 0.0
    window_steps: int = 0
    last_train: Tally = field(default_factory=Tally)
    last_validation: LastLook | None = None
    saved_at: float | None = None  # the moment, and the seconds that it took
    save_seconds: float = 0.0
    being_saved: BeingSaved | None = None
    looked: set[bool] = field(default_factory=set)  # whether all validation rows, or only the first ones, fit in memory

    @property
    def trainer(self) -> Trainer:
        return self.objective.trainer

    @property
    def schedule(self) -> Schedule:
        return Schedule.of(self.spec, total_steps=self.plan.total_steps)


def train(run: TrainingRun) -> None:
    """Run to the last step, or to an early stop. Raises what `turns` raises."""
    for _ in turns(run):
        pass


def turns(run: TrainingRun) -> Iterator[None]:
    """Train, and pause after each step once its look is done: another run may have the device then.

    However it ends, every checkpoint that was begun is complete and told.

    Raises:
        StoppedOnRequest: a stop was asked for; the checkpoint of the steps done is complete.
        Invalid: codes `nan_loss`, `loss_diverged`.
    """
    try:
        yield from _turns(run)
    except BaseException:
        with contextlib.suppress(OSError):  # a disk that is full is not why it ends
            finish_saving(run)
        raise
    finish_saving(run)


def _turns(run: TrainingRun) -> Iterator[None]:
    run.learner.model.train()
    run.saved_at = run.clock()
    if run.progress.looked_step < run.progress.step:  # the last attempt may have ended before the look was over
        _look_and_save(run)
    while run.progress.step < run.plan.total_steps and not run.progress.early_stopped:
        if run.stop:
            _stop(run)
        if run.progress.step == 0:  # kernels may be compiled: minutes without a word
            with run.reporter.working("step"), refused_for_good("taking the first step"):
                _one_step(run)
        else:
            _one_step(run)
        if run.stop:
            _stop(run)
        if run.being_saved is not None and run.being_saved.place.done():
            finish_saving(run)
        _look_and_save(run)
        yield


def _one_step(run: TrainingRun) -> None:
    """One update of the weights from the rows that the plan gives this step."""
    began = run.clock()
    progress = run.progress
    rows = [run.train_rows[index] for index in run.plan.row_indices(progress.step)]
    sums = _accumulate(run, rows)
    learning_rate = run.learner.scheduler.get_last_lr()[0]
    tally, grad_norm = _update(run, sums)
    progress.step += 1
    progress.trained_tokens += tally.tokens
    seconds = run.clock() - began
    progress.train_seconds += seconds
    _report_step(run, tally, learning_rate=learning_rate, grad_norm=grad_norm, seconds=seconds)
    guess = math.log(run.trainer.model.config.get_text_config().vocab_size)
    if OBJECTIVES[run.spec.job.objective.type].guess_bounds_loss:
        check_divergence(tally.loss, progress=progress, worst=guess)


def _accumulate(run: TrainingRun, rows: Sequence[Row]) -> Sums:
    """Gradients of the mean loss over all labelled tokens (or rows) of the step, however it is split."""
    sums = Sums()
    batches = passes(run.objective.with_neighbours(rows), run.objective, ranks=run.ranks)
    run.objective.prepare_passes(run.trainer.model_wrapped, batches, summed=run.ranks.summed)
    (weight,) = run.ranks.summed(sum(batch.weight for batch in batches))
    for batch in batches:
        loss = run.objective.loss(run.trainer.model_wrapped, batch)
        run.trainer.accelerator.backward(loss.total / weight * (batch.weight > 0))
        sums.add(loss, batch=batch)
        run.reporter.alive("step")
    run.ranks.sum_gradients(run.learner.model.parameters())
    return sums


def _update(run: TrainingRun, sums: Sums) -> tuple[Tally, float]:
    """Clip, step, schedule. Returns the figures over all ranks, and the gradient norm before clipping.

    Here, and nowhere else in a step, the host waits for what the device has found.
    """
    parameters = run.learner.model.parameters()
    clipped: Any = run.trainer.accelerator.clip_grad_norm_(parameters, run.spec.job.training.max_grad_norm)
    mine, (grad_norm,) = sums.read(torch.as_tensor(clipped))
    tally = mine.over(run.ranks)
    scaler = run.trainer.accelerator.scaler
    check_numbers(tally.loss, grad_norm, step=run.progress.step + 1, loss_scale=scaler.get_scale() if scaler else None)
    run.learner.optimizer.step()
    run.learner.scheduler.step()
    run.learner.optimizer.zero_grad()
    return tally, grad_norm


def _report_step(run: TrainingRun, tally: Tally, *, learning_rate: float, grad_norm: float, seconds: float) -> None:
    run.window = run.window.plus(tally)
    run.window_seconds += seconds
    run.window_steps += 1
    step = run.progress.step
    if step % run.schedule.log_every and step != run.plan.total_steps:
        return
    run.reporter.write(
        Metrics,
        step=step,
        total_steps=run.plan.total_steps,
        epoch=step / run.plan.steps_per_epoch,
        train_loss=run.window.loss,
        train_mean_token_accuracy=run.window.accuracy,
        learning_rate=learning_rate,
        grad_norm=grad_norm if math.isfinite(grad_norm) else None,
        trained_tokens=run.progress.trained_tokens,
        seconds_per_step=run.window_seconds / run.window_steps,
        memory_bytes=held_memory_bytes(),
    )
    run.last_train, run.window = run.window, Tally()
    run.window_seconds, run.window_steps = 0.0, 0


def _look_and_save(run: TrainingRun) -> None:
    """Validation and checkpoint, where they are due after this step."""
    step = run.progress.step
    ends_epoch = run.plan.ends_epoch(step)
    better = False
    if run.validation_rows and (ends_epoch or step % run.schedule.evaluate_every == 0):
        _save_before_a_first_look(run, full=ends_epoch)
        better = _validate(run, full=ends_epoch)
    every = run.schedule.save_every
    due = ends_epoch or _long_unsaved(run) if every is None else step % every == 0 or step == run.plan.total_steps
    if better or due or run.progress.early_stopped:
        save_checkpoint(run, beside_steps=saves_beside_steps(run.spec))


def _long_unsaved(run: TrainingRun) -> bool:
    """Whether the last checkpoint is so old that a crash would cost much; all ranks hold the same for true."""
    if run.saved_at is None:
        return False
    age = run.clock() - run.saved_at
    # The first rank alone knows how long saving takes.
    return run.ranks.any(run.ranks.first and age >= max(SAVE_SECONDS, run.save_seconds / SAVE_SHARE))


def _save_before_a_first_look(run: TrainingRun, *, full: bool) -> None:
    """Several ranks that run out of memory over validation rows go on from the last checkpoint: lose no step by it."""
    if run.ranks.world > 1 and full not in run.looked:
        save_checkpoint(run)
    run.looked.add(full)


def _validate(run: TrainingRun, *, full: bool) -> bool:
    """Report the validation loss; True if it is the lowest so far.

    Best and early stopping always compare the same rows: the first `eval.max_rows`. The rest is read for the report.
    """
    limit = run.spec.job.training.eval.max_rows
    seen = _evaluate(run, run.validation_rows[:limit])
    rest = _evaluate(run, run.validation_rows[limit:]) if full and seen is not None else Tally()
    if seen is None or rest is None:
        return False
    scores = None if run.answers is None else run.answers.look(run.learner.model, should_stop=lambda: bool(run.stop))
    if run.answers is not None and run.stop:
        return False
    reported = seen.plus(rest)
    full = full or len(run.validation_rows) <= limit
    run.reporter.write(
        Validation,
        step=run.progress.step,
        valid_loss=reported.loss,
        valid_mean_token_accuracy=reported.accuracy,
        full=full,
        **_told(scores),
    )
    run.last_validation = LastLook(run.progress.step, reported, full)
    run.progress.looked_step = run.progress.step
    return note_validation(run.progress, seen.loss, spec=run.spec, scores=scores)


def _told(scores: Scores | None) -> dict[str, Any]:
    """The scores of answers as the event names them."""
    if scores is None:
        return {}
    return {"valid_answers": scores.answered, **{f"valid_{name}": mean for name, mean in scores.means.items()}}


def _evaluate(run: TrainingRun, rows: Sequence[Row]) -> Tally | None:
    return run.evaluator.evaluate(run.learner.model, rows, should_stop=lambda: bool(run.stop))


def saves_beside_steps(spec: AttemptSpec) -> bool:
    """Whether a thread brings checkpoints to the disk while a GPU goes on.

    Not where all weights train: their copy would stay in the host's memory beside the next steps. Not on a CPU, whose
    cores the steps want themselves.
    """
    adapter = METHODS[spec.job.adapter.method].adapter
    return spec.device == "cuda" and adapter and "background_saving" not in spec.without


def save_checkpoint(run: TrainingRun, *, beside_steps: bool = False) -> None:
    """Write the checkpoint of the steps done, tell, and remove those no longer needed.

    Args:
        beside_steps: return once nothing of it changes any more. `finish_saving` does the rest.
    """
    finish_saving(run)
    began = run.clock()
    with run.reporter.working("checkpoint"):
        taken = checkpoints.taken(
            run.out / "checkpoints",
            learner=run.learner,
            progress=run.progress,
            job_id=run.spec.job_id,
            write_adapter=run.write_adapter,
            ranks=run.ranks,
        )
        if taken is not None:
            place = _written(taken, beside_steps=beside_steps)
            run.being_saved = BeingSaved(place, began, _figures(run), run.progress.best_step)
    run.saved_at = run.clock()
    if not beside_steps:
        finish_saving(run)
        run.ranks.wait()


def _written(taken: checkpoints.Taken, *, beside_steps: bool) -> Future[Path]:
    if not beside_steps:
        ended = Future[Path]()
        ended.set_result(taken.written())
        return ended
    writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    try:
        return writer.submit(taken.written)
    finally:
        writer.shutdown(wait=False)


def finish_saving(run: TrainingRun) -> None:
    """Wait until the checkpoint that is being written, if any, is complete. Raises OSError where it cannot be."""
    being, run.being_saved = run.being_saved, None
    if being is None:
        return
    with run.reporter.working("checkpoint"):
        place = being.place.result()
    run.save_seconds = run.clock() - being.began
    run.reporter.write(CheckpointSaved, name=place.name, save_seconds=run.save_seconds, **being.figures)
    checkpoints.prune(place.parent, keep_steps={being.best_step, run.progress.best_step})


def _figures(run: TrainingRun) -> dict[str, Any]:
    """What the event of a checkpoint tells beside its name."""
    look = run.last_validation
    looked = look.tally if look is not None and look.step == run.progress.step else None
    whole = looked if look is not None and look.full else None
    return {
        "step": run.progress.step,
        "train_loss": run.last_train.loss if run.last_train.weight else None,
        "train_mean_token_accuracy": run.last_train.accuracy if run.last_train.weight else None,
        "valid_loss": looked.loss if looked else None,
        "valid_mean_token_accuracy": looked.accuracy if looked else None,
        "full_valid_loss": whole.loss if whole else None,
        "full_valid_mean_token_accuracy": whole.accuracy if whole else None,
    }


def _stop(run: TrainingRun) -> None:
    save_checkpoint(run)
    raise StoppedOnRequest(checkpoints.folder_name(run.progress.step))
