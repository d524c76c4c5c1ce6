"""The trainer: `python -m worker.train SPEC OUT`, or `--handover N`. Files in, files out; contract: docs/trainer.md.

Exit codes: 0 done, 3 the user's fault, 4 out of memory, 5 stopped on request with a complete checkpoint; anything else
is a crash worth a retry.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from worker.train import light_start

if __name__ == "__main__":
    light_start.begin()

import torch
from transformers import set_seed
from transformers.integrations.neftune import activate_neftune

from shared.contract.events import (
    EXIT_DONE,
    EXIT_OUT_OF_MEMORY,
    EXIT_STOPPED,
    EXIT_USER_FAULT,
    Failed,
    Finished,
    Started,
)
from shared.contract.methods import METHODS
from shared.contract.spec import AnswerMeasure, AttemptSpec, PublishBy
from shared.errors import TunepoolError
from worker.train import checkpoints, evaluation_rows, export
from worker.train.answer_look import AnswerLook
from worker.train.base_model import load_model, recompute_activations
from worker.train.checkpoints import Progress, TrainingState
from worker.train.cpu_parts import kernels_serve, use_kernels
from worker.train.data import Row, RowReader, RowSet
from worker.train.evaluation_rows import EvaluationTooLarge
from worker.train.experts import without_router_loss
from worker.train.fused_norms import fuse_norms
from worker.train.gpu_parts import fuse_parts
from worker.train.guards import NoTrainableParameters
from worker.train.loop import TrainingRun, save_checkpoint, train
from worker.train.memory import (
    MAY_MEAN_MEMORY,
    MemoryReserve,
    Peaks,
    device_bytes_in_use,
    limit_memory,
    out_of_memory_code,
    peak_memory,
)
from worker.train.methods import adapt, make_optimizer, trainable, with_float32_adapters
from worker.train.objectives.objective import Objective
from worker.train.objectives.table import OBJECTIVES
from worker.train.packing import StepPlan
from worker.train.parent_adapter import begins_as, merged_into, stands_on
from worker.train.prepared import HeldModel, load_prepared
from worker.train.ranks import Ranks
from worker.train.reporting import Reporter
from worker.train.sequence_state import packed_only_apart
from worker.train.sharding import shard_frozen_layers
from worker.train.stack_faults import refused_for_good
from worker.train.started_ahead import held_by, work_of
from worker.train.stopping import StoppedOnRequest, StopRequest
from worker.train.targets import say_what_stays_frozen
from worker.train.tokenizer import generation_ends, load_tokenizer
from worker.train.validation import ROWS_AT_ONCE, Evaluator


def main(spec_file: Path, out: Path, *, held: HeldModel | None = None) -> int:
    """Run one attempt and translate how it ends into an exit code. `held`: a base model that is in memory already."""
    out.mkdir(parents=True, exist_ok=True)
    events = out / "events.jsonl"
    reporter = Reporter(events, clock=time.time, log=sys.stdout)
    before: int | None = None
    reserve = MemoryReserve()
    try:
        spec = AttemptSpec.model_validate_json(spec_file.read_bytes())
        before = device_bytes_in_use(spec)
        ranks = Ranks.join(spec)
        stop = StopRequest(out, ranks=ranks)
        if ranks.world == 1:  # of several ranks the launcher takes the signal, and ends the others when one dies
            stop.listen()
        own_reporter = reporter if ranks.first else Reporter(None, clock=time.time)
        run_attempt(spec, out=out, reporter=own_reporter, stop=stop, ranks=ranks, before=before, held=held)
        ranks.leave()
    except EvaluationTooLarge as too_large:
        reserve.let_go()
        evaluation_rows.write(out, too_large.fitting)
        return EXIT_OUT_OF_MEMORY
    except (StoppedOnRequest, TunepoolError, *MAY_MEAN_MEMORY) as error:
        code = report_end(error, reporter=reporter, reserve=reserve, peaks=lambda: peak_memory(spec, before=before))
        if code is None:
            raise
        return code
    return EXIT_DONE


def report_end(
    error: Exception, *, reporter: Reporter, reserve: MemoryReserve, peaks: Callable[[], Peaks]
) -> int | None:
    """Tell why a run ended with `error`, and return its exit code. None: it is a crash, and says nothing."""
    if isinstance(error, StoppedOnRequest):
        return EXIT_STOPPED
    if isinstance(error, TunepoolError):
        reporter.write(Failed, code=error.code, message=error.message, param=error.param)
        return EXIT_USER_FAULT
    reserve.let_go()
    code = out_of_memory_code(error)
    if code is None:
        return None
    message = str(error).splitlines()[0] if str(error) else "out of memory"
    reporter.write(Failed, code=code, message=message, **_told(peaks()))
    return EXIT_OUT_OF_MEMORY


def _told(peaks: Peaks) -> dict[str, int]:
    return {"peak_memory_bytes": peaks.whole, "peak_allocated": peaks.allocated, "peak_reserved": peaks.reserved}


def run_attempt(
    spec: AttemptSpec,
    *,
    out: Path,
    reporter: Reporter,
    stop: StopRequest,
    ranks: Ranks,
    before: int | None,
    held: HeldModel | None = None,
) -> None:
    """Limits, then the acts in order: preparation, training, product.

    `before`: bytes of the device that others held when this process began.
    """
    torch.set_num_threads(spec.cpu_threads)
    limit_memory(spec)
    base = partial(load_base, held=held)
    run, tokenizer = prepare(spec, out=out, reporter=reporter, stop=stop, ranks=ranks, load_base=base)
    train(run)
    publish(run, tokenizer=tokenizer, before=before)


def prepare(
    spec: AttemptSpec,
    *,
    out: Path,
    reporter: Reporter,
    stop: StopRequest,
    ranks: Ranks,
    load_base: Callable[[AttemptSpec], Any],
) -> tuple[TrainingRun, Any]:
    """Everything before the first step: tokenizer, data, model, adapter, objective, resumption. With the tokenizer."""
    set_seed(spec.job.seed)

    tokenizer = load_tokenizer(spec)
    with reporter.working("loading"):
        data, validation = _read_data(spec, tokenizer=tokenizer, reporter=reporter)
    plan = _plan(spec, rows=len(data.rows))
    resume_from = checkpoints.newest_intact(out / "checkpoints", job_id=spec.job_id)
    _agree_on_start(resume_from, ranks)

    with reporter.working("loading"), refused_for_good("loading the base model"):
        base = load_base(spec)
    without_router_loss(base, reporter=reporter)
    say_what_stays_frozen(base, spec, reporter=reporter)
    with reporter.working("loading"), refused_for_good("adapting the base model"):
        spec = packed_only_apart(spec, base, reporter=reporter)
        objective = _build_objective(base, spec, out=out, tokenizer=tokenizer, plan=plan, rows=data.rows, ranks=ranks)
        learner = _make_learner(spec, objective=objective, plan=plan)
    ranks.agree_on(trainable(learner.model).values())
    progress = Progress()
    set_seed(spec.job.seed + ranks.rank)  # what building consumed must not shift the run
    if resume_from is not None:
        progress = checkpoints.read_progress(resume_from)
        with reporter.working("loading"):
            checkpoints.restore(resume_from, learner, rank=ranks.rank)

    run = TrainingRun(
        spec=spec,
        out=out,
        objective=objective,
        evaluator=Evaluator(objective, reporter, ranks, rows_at_once=evaluation_rows.read(out) or ROWS_AT_ONCE),
        answers=AnswerLook.of(spec, learner.model, tokenizer, reporter=reporter, ranks=ranks),
        learner=learner,
        plan=plan,
        progress=progress,
        train_rows=data.rows,
        validation_rows=validation.rows if validation else [],
        reporter=reporter,
        stop=stop,
        ranks=ranks,
        write_adapter=lambda folder: export.write_weights(learner.model, folder, spec=spec, initial=out / "initial"),
    )
    _announce(run, data)
    return run, tokenizer


def _agree_on_start(resume_from: Path | None, ranks: Ranks) -> None:
    """Every host has its own copy of the checkpoint; ranks that began at unlike steps would wait for each other."""
    starts = ranks.gathered(None if resume_from is None else resume_from.name)
    if len(set(starts)) > 1:
        raise RuntimeError(f"the hosts of this job would go on from unlike checkpoints: {starts}")


def _read_data(spec: AttemptSpec, *, tokenizer: Any, reporter: Reporter) -> tuple[RowSet, RowSet | None]:
    reader = RowReader(
        tokenizer,
        facts=spec.job.data,
        training=spec.job.training,
        ends=generation_ends(tokenizer, Path(spec.base_model_path)),
    )
    data = reader.read(Path(spec.train_file))
    if data.dropped:
        reporter.say(f"{data.dropped} training rows have no token to learn from and are left out.", level="warn")
    if data.truncated:
        reporter.say(f"{data.truncated} training rows are cut at {spec.job.training.max_length} tokens.", level="warn")
    _say_unwritten(data, "training", reporter)
    if spec.validation_file is None:
        return data, None
    validation = reader.read(Path(spec.validation_file))
    _say_unwritten(validation, "validation", reporter)
    return data, validation


def _say_unwritten(data: RowSet, name: str, reporter: Reporter) -> None:
    for entry in data.unwritten:
        first, count = entry.rows.rows[0], entry.rows.count
        reporter.say(f"{count} {name} rows, the first of them row {first}: {entry.message}", level="warn")


def _plan(spec: AttemptSpec, *, rows: int) -> StepPlan:
    training = spec.job.training
    return StepPlan(
        rows=rows,
        batch_size=training.batch_size,
        epochs=training.num_train_epochs,
        max_steps=training.max_steps,
        seed=spec.job.seed,
    )


def load_base(spec: AttemptSpec, held: HeldModel | None = None) -> Any:
    """What the job's method adapts: the frozen base, or weights that all train."""
    method, weights = METHODS[spec.job.adapter.method], Path(spec.base_model_path)
    if held is not None and (model := held.taken_by(spec)) is not None:
        return model
    if spec.prepared_path is not None:
        return load_prepared(Path(spec.prepared_path), base=weights, dtype=spec.job.training.dtype)
    if method.adapter:
        return load_model(spec, weights=weights, quantized=method.quantized, trains_in_full=False)
    beneath = stands_on(spec)
    whole = load_model(spec, weights=begins_as(spec) or weights, quantized=False, trains_in_full=True)
    return whole if beneath is None else merged_into(whole, beneath)


def _build_objective(
    base: Any, spec: AttemptSpec, *, out: Path, tokenizer: Any, plan: StepPlan, rows: Sequence[Row], ranks: Ranks
) -> Objective:
    if spec.device == "cuda" and "fused_norms" not in spec.without:
        fuse_norms(base)
    fuse_parts(base, spec)
    if kernels_serve(spec):
        use_kernels(base, out=out)
    model = adapt(base, spec=spec, initial=out / "initial" if ranks.first else None, rows=rows)
    if not trainable(model):
        raise NoTrainableParameters("No parameter is left to train.", param="adapter")
    if spec.job.placement.strategy == "fsdp":  # before upstream's trainer, which moves what it gets to the device
        shard_frozen_layers(model, ranks=ranks, device=spec.device)
    if spec.gradient_checkpointing:
        recompute_activations(model, layers=spec.gradient_checkpointing_layers)
    if spec.job.training.neftune_noise_alpha is not None:
        activate_neftune(model, spec.job.training.neftune_noise_alpha)
    build = OBJECTIVES[spec.job.objective.type]
    return with_float32_adapters(
        model, lambda: build(model, tokenizer, spec=spec, out=out, total_steps=plan.total_steps)
    )


def _make_learner(spec: AttemptSpec, *, objective: Objective, plan: StepPlan) -> TrainingState:
    trainer = objective.trainer
    make_optimizer(trainer, spec.job.adapter)
    # evaluation_mode: precision and placement without upstream's DDP wrapper (ranks.py says why).
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)
    trainer.optimizer = trainer.accelerator.prepare_optimizer(trainer.optimizer)
    scheduler = trainer.create_scheduler(plan.total_steps)
    return TrainingState(
        model=trainer.model, optimizer=trainer.optimizer, scheduler=scheduler, scaler=trainer.accelerator.scaler
    )


def _announce(run: TrainingRun, data: RowSet) -> None:
    every = [parameter.numel() for parameter in run.learner.model.parameters()]
    learning = [parameter.numel() for parameter in trainable(run.learner.model).values()]
    run.reporter.write(
        Started,
        total_steps=run.plan.total_steps,
        first_step=run.progress.step,
        trainable_parameters=sum(learning),
        all_parameters=max(sum(every), run.spec.job.base_model.facts.parameters),
        train_rows=len(data.rows),
        sequences=_sequences_per_epoch(run),
        truncated_rows=data.truncated,
        train_tokens_per_epoch=sum(row.tokens for row in data.rows),
        labelled_tokens_per_epoch=sum(row.labelled_tokens for row in data.rows),
    )


def _sequences_per_epoch(run: TrainingRun) -> int:
    steps = range(run.plan.steps_per_epoch)
    return sum(run.objective.sequences([run.train_rows[row] for row in run.plan.row_indices(step)]) for step in steps)


def publish(run: TrainingRun, *, tokenizer: Any, before: int | None) -> None:
    """Put the chosen checkpoint's weights into `OUT/adapter` and say which and why."""
    step, reason = choose_checkpoint(run)
    place = run.out / "checkpoints" / checkpoints.folder_name(step)
    if run.ranks.any(run.ranks.first and not place.is_dir()):
        save_checkpoint(run)
    mine = peak_memory(run.spec, before=before)
    peaks = Peaks(*[run.ranks.most(figure) for figure in (mine.allocated, mine.reserved, mine.whole)])
    if not run.ranks.first:
        return
    with run.reporter.working("checkpoint"):
        export.publish(place, out=run.out, spec=run.spec, tokenizer=tokenizer, reason=reason)
    run.reporter.write(
        Finished,
        steps=run.progress.step,
        trained_tokens=run.progress.trained_tokens,
        published_step=step,
        published_reason=reason,
        train_seconds=run.progress.train_seconds,
        **_told(peaks),
    )


def choose_checkpoint(run: TrainingRun) -> tuple[int, str]:
    """The step whose weights are published, and why."""
    progress = run.progress
    publish = run.spec.job.training.publish
    if publish == "last":
        return progress.step, "the last checkpoint was asked for"
    if isinstance(publish, PublishBy):
        return _best_answers(progress, by=publish.by)
    if progress.best_step is None or progress.best_loss is None:
        return progress.step, "the last checkpoint: there is no validation file to choose by"
    ended = "; stopped early" if progress.early_stopped else ""
    return progress.best_step, f"lowest validation loss, {progress.best_loss:.4f} at step {progress.best_step}{ended}"


def _best_answers(progress: Progress, *, by: AnswerMeasure) -> tuple[int, str]:
    if progress.best_step is None or progress.best_score is None:
        return progress.step, f"the last checkpoint: no look had all its answers to choose by {by}"
    ended = "; stopped early" if progress.early_stopped else ""
    return progress.best_step, f"best answers, {by} {progress.best_score:.4f} at step {progress.best_step}{ended}"


if __name__ == "__main__":
    light_start.end()
    ahead = held_by(sys.argv[1:])
    sys.exit(main(*work_of(sys.argv[1:]), held=ahead))
