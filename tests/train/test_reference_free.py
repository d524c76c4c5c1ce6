"""ORPO and SimPO: TRL's losses, without a reference model."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shared.contract.events import EXIT_DONE
from shared.contract.spec import AttemptSpec
from tests.train.test_resume import interrupt
from tests.train.tiny import losses, make_spec, make_tokenizer, preference_rows, run
from worker.train.data import AnswersRow
from worker.train.objectives.reference_free import build, orpo_loss

with warnings.catch_warnings(action="ignore"):  # importing them says that they may change
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

SETTINGS: dict[str, Any] = {"rows": preference_rows(8), "data_format": "preference"}
ROWS = [
    AnswersRow(prompt_ids=[5, 6, 7], answers=[[8, 9], [10, 11, 12, 13]], label=True),
    AnswersRow(prompt_ids=[20, 21, 22, 23, 24], answers=[[30, 31, 32, 33], [34]], label=True),
]


def our_loss(model: Path, folder: Path, objective: dict[str, Any], rows: list[AnswersRow]) -> tuple[float, Any]:
    """The summed loss of the rows in one pass, and the model that it was taken from."""
    spec = make_spec(folder, model=model, objective=objective, **SETTINGS)
    network = AutoModelForCausalLM.from_pretrained(model)
    told = AttemptSpec.model_validate_json(spec.read_bytes())
    ours = build(network, make_tokenizer(), spec=told, out=folder, total_steps=1)
    (batch,) = ours.micro_batches(rows)
    assert (batch.weight, batch.tokens) == (len(rows), sum(row.tokens for row in rows))
    return ours.loss(network, batch).total.item(), network


def upstreams_loss(kind: Any, network: Any, row: AnswersRow, **options: Any) -> float:
    """What TRL's own trainer makes of one row: its forward pass and its loss, without its data and its logs."""
    trainer = kind.__new__(kind)
    given = {
        "is_encoder_decoder": False,
        "padding_value": 2,
        "pad_token_id": 2,
        "aux_loss_enabled": False,
        "label_smoothing": 0.0,
        "alpha": 0.0,
        "accelerator": SimpleNamespace(
            device=torch.device("cpu"), gather_for_metrics=lambda figures: figures, num_processes=1
        ),
        **options,
    }
    for name, value in given.items():
        setattr(trainer, name, value)
    batch = {}
    for name, answer in zip(("chosen", "rejected"), row.answers, strict=True):
        ids = torch.tensor([row.prompt_ids + answer])
        batch |= {f"{name}_input_ids": ids, f"{name}_attention_mask": torch.ones_like(ids)}
        batch[f"{name}_labels"] = torch.tensor([[-100] * len(row.prompt_ids) + answer])
    loss, _ = trainer.get_batch_loss_metrics(network, batch)
    return loss.item()


UPSTREAM = {
    "orpo": (ORPOTrainer, {"beta": 0.3}, {"beta": 0.3}),
    "simpo": (
        CPOTrainer,
        {"beta": 2.5, "gamma": 0.7},
        {"beta": 2.5, "simpo_gamma": 0.7, "loss_type": "simpo", "cpo_alpha": 0.0},
    ),
}


@pytest.mark.parametrize("objective", ["orpo", "simpo"])
def test_the_loss_of_a_row_is_trls_own_and_a_pass_sums_its_rows(model: Path, tmp_path: Path, objective: str) -> None:
    kind, asked, options = UPSTREAM[objective]
    total, network = our_loss(model, tmp_path, {"type": objective, **asked}, ROWS)

    upstream = [upstreams_loss(kind, network, row, **options) for row in ROWS]

    assert total == pytest.approx(sum(upstream), rel=1e-5)
    assert upstream[0] != pytest.approx(upstream[1], rel=1e-2), "rows that differ"


def test_an_answer_that_is_certain_leaves_the_gradient_of_orpo_finite() -> None:
    from_model = torch.tensor([[0.0, 0.0], [-1.0, -2.0]], requires_grad=True)
    everything = torch.ones(2, 2)

    loss = orpo_loss(0.1)(from_model, everything, everything).sum()
    loss.backward()

    assert torch.isfinite(loss)
    assert from_model.grad is not None
    assert torch.isfinite(from_model.grad).all()


def test_orpo_trains_every_weight_as_it_needs_no_reference(model: Path, tmp_path: Path) -> None:
    training = {"num_train_epochs": 4, "lr_scheduler_type": "constant", "learning_rate": 1e-3}
    spec = make_spec(
        tmp_path, model=model, objective={"type": "orpo"}, adapter={"method": "full"}, training=training, **SETTINGS
    )
    code, events = run(spec, tmp_path / "out")

    assert code == EXIT_DONE, events[-1]
    curve = losses(events)
    assert curve[8] < curve[1]


@pytest.mark.parametrize("objective", ["orpo", "simpo"])
def test_an_interrupted_run_ends_with_the_weights_of_one_that_was_not(
    model: Path, tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = {"model": model, "objective": {"type": objective}, **SETTINGS}
    assert run(make_spec(whole, **settings), whole / "out")[0] == EXIT_DONE
    interrupt(make_spec(broken, **settings), broken / "out", after=2, monkeypatch=monkeypatch)
    assert run(broken / "spec.json", broken / "out")[0] == EXIT_DONE

    unbroken, resumed = (
        load_file(place / "out" / "adapter" / "adapter_model.safetensors") for place in (whole, broken)
    )
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
