from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import KTOTrainer

from shared.contract.events import EXIT_DONE
from tests.train.tiny import kto_rows, losses, make_spec, make_tokenizer, preference_rows, run
from worker.train.objectives.kto import KtoObjective
from worker.train.objectives.objective import MicroBatch

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def train(folder: Path, model: Path, objective: dict[str, Any], **settings: Any) -> tuple[int, list[Any]]:
    rows = kto_rows(8) if objective["type"] == "kto" else preference_rows(8)
    data_format = "kto" if objective["type"] == "kto" else "preference"
    training = {"num_train_epochs": 6, "lr_scheduler_type": "constant"}
    settings = {"rows": rows, "validation": rows[:2], "training": training, **settings}
    spec = make_spec(folder, model=model, data_format=data_format, objective=objective, **settings)
    return run(spec, folder / "out")


def preference_for_good(model: Any) -> float:
    """Log-probability of "good" over that of "bad one" after a question."""
    tokenizer = make_tokenizer()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1?"}], add_generation_prompt=True, tokenize=False
    )

    def log_probability(answer: str) -> float:
        ids = torch.tensor([tokenizer(prompt + answer)["input_ids"]])
        start = len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            scores = model(ids).logits.log_softmax(-1)[0, start - 1 : -1]
        return scores.gather(1, ids[0, start:, None]).sum().item()

    return log_probability("good<|im_end|>") - log_probability("bad one<|im_end|>")


@pytest.mark.parametrize(
    ("objective", "method"),
    [
        ("dpo", "lora"),
        ("dpo", "qlora"),
        ("kto", "lora"),
        ("kto", "qlora"),
        ("orpo", "qlora"),
        ("simpo", "lora"),
    ],
)
def test_the_model_comes_to_prefer_the_good_answer(model: Path, tmp_path: Path, objective: str, method: str) -> None:
    code, events = train(tmp_path, model, {"type": objective}, adapter={"method": method})

    assert code == EXIT_DONE, events[-1]
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    before = preference_for_good(base)
    after = preference_for_good(PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval())
    assert after > before + 1
    assert events[-1].type == "finished"
    assert any(event.type == "validation" for event in events)


def test_the_first_dpo_loss_is_that_of_indifference(model: Path, tmp_path: Path) -> None:
    """Policy and reference agree until the first update: the reference is the base with the adapter disabled."""
    _, events = train(tmp_path, model, {"type": "dpo"})

    assert losses(events)[1] == pytest.approx(math.log(2), rel=1e-4)
    files = {file.name for file in (tmp_path / "out" / "adapter").iterdir()}
    assert "ref" not in files  # no second adapter either


@pytest.mark.parametrize("loss_type", ["ipo", "hinge", "robust", "exo_pair", "apo_zero", "apo_down"])
def test_every_dpo_loss_trains(model: Path, tmp_path: Path, loss_type: str) -> None:
    objective = {"type": "dpo", "loss_type": loss_type}
    code, events = train(tmp_path, model, objective, training={"max_steps": 2})

    assert code == EXIT_DONE, events[-1]
    assert all(math.isfinite(loss) for loss in losses(events).values())


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo", "simpo"])
def test_a_smaller_micro_batch_leaves_the_curve_as_it_was(model: Path, tmp_path: Path, objective: str) -> None:
    curves = [
        losses(train(tmp_path / str(size), model, {"type": objective}, micro_batch_size=size)[1]) for size in (4, 1)
    ]

    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_the_kl_term_is_the_policys_gain_on_neighbours_answers_over_the_whole_step(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass with all rows of a step is what TRL was written for: there its own figure is ours."""
    told: list[tuple[float, float]] = []
    whole_loss = KtoObjective.loss

    def beside_upstream(objective: KtoObjective, network: Any, batch: MicroBatch) -> Any:
        trainer, inputs = objective.trainer, dict(batch.inputs)
        policy = KTOTrainer._compute_kl_logps(trainer, network, inputs)
        _, reference = KTOTrainer.compute_ref_log_probs(trainer, network, inputs)
        told.append((trainer.divergence, (policy - reference).mean().clamp(min=0).item()))
        return whole_loss(objective, network, batch)

    monkeypatch.setattr(KtoObjective, "loss", beside_upstream)
    code, events = train(tmp_path, model, {"type": "kto"}, validation=None)

    assert code == EXIT_DONE, events[-1]
    ours, upstreams = zip(*told, strict=True)
    assert ours == pytest.approx(upstreams, abs=1e-5)
    assert max(ours) > 0.1
