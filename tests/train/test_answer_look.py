"""Answers at each look: measured, told, able to choose the checkpoint, and without any trace in the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared.contract.spec import AttemptSpec
from tests.train.tiny import chat, chat_rows, losses, make_spec, run
from worker.train import answer_look, batched_answers
from worker.train.answer_look import Scores
from worker.train.best_step import note_validation
from worker.train.checkpoints import Progress

KNOWN = [chat("who?", "me"), chat("say it", "me"), {"messages": [{"role": "user", "content": "no answer"}]}]
LEARNS = {"num_train_epochs": 8, "learning_rate": 0.02, "lr_scheduler_type": "constant", "optim": "adamw_torch"}


def asking(**values: Any) -> dict[str, Any]:
    return {"steps": 2, "generate": {"max_tokens": 6, "measures": ["exact_match", "json_valid"]} | values}


def taught(folder: Path, model: Path, **values: Any) -> tuple[list[Any], Path]:
    """Events and OUT of a run that learns one answer by heart, looked at on two rows."""
    values["training"] = LEARNS | values.get("training", {})
    spec = make_spec(folder, model=model, rows=[chat("who?", "me")] * 8, validation=KNOWN[:2], **values)
    code, events = run(spec, folder / "out")
    assert code == 0, events[-1]
    return events, folder / "out"


def test_answers_are_measured_at_each_look_and_choose_what_is_published(model: Path, tmp_path: Path) -> None:
    slowly = {"learning_rate": 0.005, "eval": asking() | {"steps": 1}, "publish": {"by": "exact_match"}}
    events, _ = taught(tmp_path, model, training=slowly)

    looks = [event for event in events if event.type == "validation"]
    assert all(look.valid_answers == 2 and look.valid_json_valid == 0.0 for look in looks)
    means = [look.valid_exact_match for look in looks]
    assert (means[0], means[-1]) == (0.0, 1.0)
    finished = events[-1]
    first_whole = min(look.valid_loss for look in looks if look.valid_exact_match == 1.0)
    assert finished.published_reason.startswith("best answers, exact_match 1.0000 at step")
    (chosen,) = [look for look in looks if look.step == finished.published_step][:1]
    assert (chosen.valid_exact_match, chosen.valid_loss) == (1.0, first_whole)


@pytest.mark.parametrize(
    "adapter",
    [{"method": "lora", "lora_dropout": 0.3}, {"method": "qlora"}, {"method": "full"}],
    ids=["dropout", "4-bit", "full"],
)
def test_a_training_with_looks_at_answers_is_the_training_without_them_to_the_bit(
    model: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    plain = {"num_train_epochs": 2, "neftune_noise_alpha": 5.0, "packing": False}
    values: dict[str, Any] = {"adapter": adapter, "gradient_checkpointing": True}

    without, one = taught(tmp_path / "without", model, training={**plain, "eval": {"steps": 2}}, **values)
    beside, other = taught(tmp_path / "with", model, training={**plain, "eval": asking()}, **values)

    assert losses(beside) == losses(without)
    assert [event.valid_loss for event in beside if event.type == "validation"] == [
        event.valid_loss for event in without if event.type == "validation"
    ]
    (name,) = {file.name for file in (one / "adapter").glob("*.safetensors")}
    weights, same = load_file(one / "adapter" / name), load_file(other / "adapter" / name)
    assert all(torch.equal(weights[key], same[key]) for key in weights)


def test_rows_without_an_answer_are_not_asked_and_only_the_first_so_many_are(model: Path, tmp_path: Path) -> None:
    rows = [{**chat("a", "1"), "tools": []}, *chat_rows(8)]
    training = {"num_train_epochs": 1, "eval": asking(rows=3, measures=["numeric"])}
    spec = make_spec(tmp_path, model=model, validation=rows, training=training)

    _, events = run(spec, tmp_path / "out")

    looks = [event for event in events if event.type == "validation"]
    assert {look.valid_answers for look in looks} == {3}
    assert all(look.valid_numeric is not None and look.valid_exact_match is None for look in looks)


def test_a_look_that_takes_too_long_ends_says_so_and_chooses_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = answer_look.AnswerLook.of

    def hurried(*args: Any, **values: Any) -> Any:
        look = begun(*args, **values)
        seconds = iter(range(0, 10**9, 100))
        look.clock = lambda: next(seconds)
        return look

    monkeypatch.setattr(answer_look.AnswerLook, "of", hurried)
    events, _ = taught(
        tmp_path, model, training={"num_train_epochs": 1, "eval": asking(), "publish": {"by": "exact_match"}}
    )

    assert any("0 of 2 rows were answered within 120 seconds" in getattr(event, "message", "") for event in events)
    assert events[-1].published_reason == "the last checkpoint: no look had all its answers to choose by exact_match"


def test_when_memory_runs_out_fewer_rows_are_answered_at_a_time_and_at_last_none(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def never(rows: int) -> Any:
        sizes.append(rows)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(batched_answers.Batch, "step", lambda batch, _model: never(len(batch._rows)))
    monkeypatch.setattr(batched_answers, "_alone", lambda *_: never(1))
    events, _ = taught(tmp_path, model, training={"num_train_epochs": 1, "eval": asking()})

    assert sizes == [2, 1], "two rows, then one, then never again"
    assert [event.message for event in events if event.type == "message" and "Memory does not suffice" in event.message]
    assert all(event.valid_answers is None for event in events if event.type == "validation")


def test_of_equally_good_answers_the_lower_loss_is_published_and_early_stopping_looks_at_the_loss(
    model: Path, tmp_path: Path
) -> None:
    training = {"publish": {"by": "exact_match"}, "eval": asking(), "early_stopping": {"patience": 2}}
    file = make_spec(tmp_path, model=model, validation=KNOWN[:2], training=training)
    spec, progress = AttemptSpec.model_validate_json(file.read_bytes()), Progress()

    def look(step: int, loss: float, mean: float, *, whole: bool = True) -> bool:
        progress.step = step
        scores = Scores(means={"exact_match": mean}, answered=2, whole=whole)
        return note_validation(progress, loss, spec=spec, scores=scores)

    assert [look(1, 3.0, 0.5), look(2, 2.0, 0.5), look(3, 1.0, 0.0), look(4, 1.5, 1.0, whole=False)] == [
        True,
        True,
        False,
        False,
    ]
    assert (progress.best_step, progress.early_stopped) == (2, False)
    assert look(5, 1.2, 1.0)
    assert (progress.best_step, progress.early_stopped) == (5, True)
