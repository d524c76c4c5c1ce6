"""Which step of a run is its best so far, and whether looks at the validation rows gain nothing any more."""

from __future__ import annotations

from shared.contract.spec import AnswerMeasure, AttemptSpec, PublishBy
from worker.train.answer_look import Scores
from worker.train.checkpoints import Progress


def note_validation(progress: Progress, loss: float, *, spec: AttemptSpec, scores: Scores | None = None) -> bool:
    """Remember the best step and count evaluations without gain. True if this step is the best so far.

    The best is that of the lowest loss, or of the best answers where `publish` names a measure. Early stopping looks at
    the loss alone.
    """
    stopping, publish = spec.job.training.early_stopping, spec.job.training.publish
    least_gain = stopping.min_delta if stopping else 0.0
    gained = progress.best_loss is None or loss < progress.best_loss - least_gain
    lowest = progress.best_loss is None or loss < progress.best_loss
    progress.evaluations_without_gain = 0 if gained else progress.evaluations_without_gain + 1
    if lowest:
        progress.best_loss = loss
    best = _answers_best(progress, loss, scores, by=publish.by) if isinstance(publish, PublishBy) else lowest
    if best:
        progress.best_step = progress.step
    progress.early_stopped = stopping is not None and progress.evaluations_without_gain >= stopping.patience
    return best


def _answers_best(progress: Progress, loss: float, scores: Scores | None, *, by: AnswerMeasure) -> bool:
    """Whether no step before had answers as good, or as good at a lower loss. A look that was cut short never is."""
    mean = scores.means.get(by) if scores is not None and scores.whole else None
    if mean is None:
        return False
    best, best_loss = progress.best_score, progress.best_score_loss
    if best is not None and best_loss is not None and (mean, -loss) <= (best, -best_loss):
        return False
    progress.best_score, progress.best_score_loss = mean, loss
    return True
