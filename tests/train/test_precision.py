from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shared.contract.methods import METHODS
from shared.contract.spec import AttemptSpec
from tests.train.tiny import chat_rows, make_spec, make_tokenizer
from worker.train.base_model import load_model
from worker.train.data import RowReader
from worker.train.methods import adapt, trainable, with_float32_adapters
from worker.train.objectives import supervised
from worker.train.objectives.supervised import SupervisedObjective


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_activations_left_in_bfloat16_give_the_very_loss_and_gradients_of_upstreams_float32_copies(
    model: Path, tmp_path: Path, method: str
) -> None:
    file = make_spec(
        tmp_path, model=model, rows=chat_rows(6), adapter={"method": method}, training={"dtype": "bfloat16"}
    )
    spec = AttemptSpec.model_validate_json(file.read_bytes())
    reader = RowReader(make_tokenizer(), facts=spec.job.data, training=spec.job.training)
    rows = reader.read(Path(spec.train_file)).rows
    objective = build(spec, out=tmp_path)

    outcomes = []
    assert objective._narrow
    for narrow in (True, False):
        objective._narrow = narrow
        (batch,) = objective.micro_batches(rows[:3])
        loss = objective.loss(objective.trainer.model_wrapped, batch).total
        loss.backward()
        outcomes.append((loss.detach(), {name: one.grad for name, one in trainable(objective.trainer.model).items()}))
        objective.trainer.model.zero_grad()

    (loss, gradients), (plain_loss, plain_gradients) = outcomes
    assert torch.equal(loss, plain_loss)
    assert any(bool(gradient.any()) for gradient in gradients.values())
    assert all(torch.equal(gradient, plain_gradients[name]) for name, gradient in gradients.items())


def build(spec: AttemptSpec, *, out: Path) -> SupervisedObjective:
    method = METHODS[spec.job.adapter.method]
    base = load_model(
        spec, weights=Path(spec.base_model_path), quantized=method.quantized, trains_in_full=not method.adapter
    )
    adapted = adapt(base, spec=spec, initial=out / "initial", rows=[])
    objective: SupervisedObjective = with_float32_adapters(
        adapted, lambda: supervised.build(adapted, make_tokenizer(), spec=spec, out=out, total_steps=1)
    )
    objective.trainer.model_wrapped = objective.trainer.accelerator.prepare(objective.trainer.model)
    # B starts at zero, where A would have no gradient.
    with torch.no_grad():
        for name, parameter in trainable(objective.trainer.model).items():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return objective
