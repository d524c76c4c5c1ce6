"""A job that goes on from a tuned model begins as that model is, and what it publishes fits the base as published."""

from __future__ import annotations

import hashlib
import json
import math
from itertools import product as combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shared.contract.events import EXIT_DONE, EXIT_STOPPED, EXIT_USER_FAULT
from tests.train.tiny import chat, kto_rows, losses, make_spec, make_tokenizer, preference_rows, run

pytestmark = [
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
    pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear"),
]

ROWS = [chat("who?", "me"), chat("where?", "here")] * 4
STILL = {"learning_rate": 1e-12, "max_steps": 1, "num_train_epochs": 1, "batch_size": 8}
LEARNING = {"num_train_epochs": 6, "lr_scheduler_type": "constant"}


def train(folder: Path, model: Path, **settings: Any) -> tuple[int, list[Any]]:
    settings = {"rows": ROWS, "training": LEARNING, **settings}
    return run(make_spec(folder, model=model, **settings), folder / "out")


def parent(product: Path, init_from: str, *, method: str = "lora") -> dict[str, Any]:
    """What a spec says of the tuned model in `product`."""
    config = product / "adapter_config.json"
    files = [
        {"name": file.name, "bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in sorted(product.iterdir())
    ]
    return {
        "parent": {
            "id": "adapter_1",
            "name": "ft:tiny:acme::0",
            "job_id": "ftjob-0",
            "init_from": init_from,
            "method": method,
            "rank": json.loads(config.read_text())["r"] if config.exists() else 0,
            "files": files,
        },
        "parent_path": str(product),
    }


def product_of(folder: Path) -> Path:
    return folder / "out" / "adapter"


def answered(model: Path, product: Path, *, whole: bool = False) -> torch.Tensor:
    """Logits of what a plain PEFT user loads."""
    base = AutoModelForCausalLM.from_pretrained(product if whole else model, dtype=torch.float32)
    loaded = base if whole else PeftModel.from_pretrained(base, product)
    ids = torch.tensor([make_tokenizer()("who are you, and where?")["input_ids"]])
    with torch.no_grad():
        return loaded.eval()(ids).logits


def last_loss(model: Path, folder: Path, product: Path, **settings: Any) -> float:
    """The loss of a product on the rows, by a job that continues it and learns nothing."""
    init = {"training": STILL, **parent(product, "continue")} | settings
    code, events = train(folder, model, **init)
    assert code == EXIT_DONE, events[-1]
    return losses(events)[1]


@pytest.fixture(scope="module")
def tuned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain LoRA of rank 4 that has learnt the rows half."""
    folder = tmp_path_factory.mktemp("tuned")
    code, events = train(folder, model, training={**LEARNING, "num_train_epochs": 3})
    assert code == EXIT_DONE, events[-1]
    return product_of(folder)


@pytest.mark.parametrize("method", ["lora", "dora", "qlora", "qdora"])
def test_a_continued_adapter_begins_with_the_loss_that_its_parent_ends_with(
    model: Path, tmp_path: Path, method: str
) -> None:
    adapter = {"method": method, "r": 4}
    few = {**LEARNING, "num_train_epochs": 2}
    _, first = train(tmp_path / "first", model, adapter=adapter, validation=ROWS[:2], training=few)
    ended = [event.valid_loss for event in first if event.type == "validation"][-1]
    product = product_of(tmp_path / "first")

    code, events = train(
        tmp_path / "on",
        model,
        adapter=adapter,
        rows=ROWS[:2],
        training=STILL,
        **parent(product, "continue", method=method),
    )

    assert code == EXIT_DONE, events[-1]
    assert losses(events)[1] == pytest.approx(ended, rel=1e-4)
    on = load_file(product_of(tmp_path / "on") / "adapter_model.safetensors")
    for name, tensor in load_file(product / "adapter_model.safetensors").items():
        assert torch.allclose(on[name], tensor, atol=1e-6), name


def test_a_continued_adapter_learns_on_and_says_what_it_goes_on_from(model: Path, tmp_path: Path, tuned: Path) -> None:
    before = last_loss(model, tmp_path / "before", tuned)

    code, events = train(tmp_path, model, **parent(tuned, "continue"))

    assert code == EXIT_DONE, events[-1]
    curve = losses(events)
    assert curve[1] == pytest.approx(before, rel=0.2)
    assert min(curve.values()) < 0.8 * before
    product = product_of(tmp_path)
    said = json.loads((product / "run_manifest.json").read_text())["parent"]
    weights = next(file for file in said["files"] if file["name"] == "adapter_model.safetensors")
    assert weights["sha256"] == hashlib.sha256((tuned / "adapter_model.safetensors").read_bytes()).hexdigest()
    card = (product / "README.md").read_text()
    assert "It goes on from `ft:tiny:acme::0`. Its weights were the start" in card
    assert weights["sha256"] in card


@pytest.mark.parametrize(
    ("method", "adapter"),
    [
        ("lora", {"r": 8, "lora_alpha": 8}),
        ("lora", {"r": 2, "lora_alpha": 16, "use_rslora": True, "rank_pattern": {"q_proj": 6}}),
        ("qlora", {"r": 8, "lora_alpha": 8}),
    ],
)
def test_on_top_of_a_parent_the_first_loss_is_the_parents(
    model: Path, tmp_path: Path, tuned: Path, method: str, adapter: dict[str, Any]
) -> None:
    before = last_loss(model, tmp_path / "before", tuned, adapter={"method": method})

    code, events = train(
        tmp_path, model, adapter={"method": method, **adapter}, training=STILL, **parent(tuned, "merged")
    )

    assert code == EXIT_DONE, events[-1]
    assert losses(events)[1] == pytest.approx(before, rel=1e-5)


def test_the_fused_step_of_a_cpu_does_not_pass_over_the_parent(model: Path, tmp_path: Path, tuned: Path) -> None:
    settings = {"adapter": {"method": "qlora"}, "training": {**STILL, "dtype": "bfloat16"}}
    for keep in (False, True):
        before = last_loss(model, tmp_path / f"before-{keep}", tuned, keep_dequantized=keep, **settings)
        _, of_base = train(tmp_path / f"base-{keep}", model, keep_dequantized=keep, **settings)
        origin = parent(tuned, "merged")
        _, events = train(tmp_path / f"on-{keep}", model, keep_dequantized=keep, **settings, **origin)

        assert losses(events)[1] == pytest.approx(before, rel=0.01)
        assert losses(of_base)[1] > 1.1 * before


def test_what_was_trained_on_top_is_published_as_one_adapter_that_answers_as_both(
    model: Path, tmp_path: Path, tuned: Path
) -> None:
    adapter = {"r": 2, "lora_alpha": 16, "use_rslora": True, "rank_pattern": {"q_proj": 6}}
    code, events = train(tmp_path, model, adapter=adapter, validation=ROWS[:2], **parent(tuned, "merged"))
    assert code == EXIT_DONE, events[-1]
    product = product_of(tmp_path)

    seen = [event.valid_loss for event in events if event.type == "validation"][-1]
    of_product = last_loss(model, tmp_path / "again", product, rows=ROWS[:2], adapter={"r": 10, "lora_alpha": 10})
    assert of_product == pytest.approx(seen, rel=1e-4)
    assert of_product < 0.8 * last_loss(model, tmp_path / "before", tuned, rows=ROWS[:2])
    config = json.loads((product / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (10, 10, False)
    assert config["base_model_name_or_path"] == "example/tiny"
    assert "the files here hold both" in (product / "README.md").read_text()


def test_an_adapter_that_learnt_nothing_on_top_leaves_the_parents_answers(
    model: Path, tmp_path: Path, tuned: Path
) -> None:
    train(tmp_path, model, training=STILL, **parent(tuned, "merged"))

    difference = (answered(model, product_of(tmp_path)) - answered(model, tuned)).abs().max()
    assert difference < 1e-4


def test_a_run_on_top_of_a_parent_that_is_stopped_ends_as_one_that_is_not(
    model: Path, tmp_path: Path, tuned: Path
) -> None:
    training = {**LEARNING, "save_steps": 2}
    settings = {"training": training, **parent(tuned, "merged")}
    _, whole = train(tmp_path / "whole", model, **settings)
    cut = make_spec(tmp_path / "cut", model=model, rows=ROWS, **settings)
    out = tmp_path / "cut" / "out"
    out.mkdir()
    (out / "stop").touch()
    assert run(cut, out)[0] == EXIT_STOPPED
    (out / "stop").unlink()

    code, again = run(cut, out)

    assert code == EXIT_DONE, again[-1]
    assert losses(again) == pytest.approx(losses(whole), rel=1e-5)
    for name, tensor in load_file(product_of(tmp_path / "whole") / "adapter_model.safetensors").items():
        assert torch.allclose(load_file(out / "adapter" / "adapter_model.safetensors")[name], tensor, atol=1e-6), name


@pytest.mark.parametrize(
    ("objective", "method", "init_from"), list(combinations(["dpo", "kto"], ["lora", "qlora"], ["continue", "merged"]))
)
def test_a_preference_objective_refers_to_the_tuned_model_and_not_to_its_base(  # noqa: PLR0917 -- fixtures
    model: Path, tmp_path: Path, tuned: Path, objective: str, method: str, init_from: str
) -> None:
    """At the first step policy and reference give every answer the same probability: log 2 for dpo, 1/2 for kto."""
    rows = kto_rows(8) if objective == "kto" else preference_rows(8)
    code, events = train(
        tmp_path,
        model,
        objective={"type": objective},
        data_format="kto" if objective == "kto" else "preference",
        rows=rows,
        adapter={"method": method},
        training={**LEARNING, "num_train_epochs": 4, "batch_size": 8},
        **parent(tuned, init_from),
    )

    assert code == EXIT_DONE, events[-1]
    assert losses(events)[1] == pytest.approx(math.log(2) if objective == "dpo" else 0.5, rel=1e-5)
    assert losses(events)[4] < 0.95 * losses(events)[1]
    assert "ref" not in {file.name for file in product_of(tmp_path).iterdir()}


def test_a_resumed_preference_run_still_refers_to_the_tuned_model(model: Path, tmp_path: Path, tuned: Path) -> None:
    settings: dict[str, Any] = {
        "objective": {"type": "dpo"},
        "data_format": "preference",
        "rows": preference_rows(8),
        "training": {**LEARNING, "num_train_epochs": 4, "batch_size": 8},
        **parent(tuned, "continue"),
    }
    _, whole = train(tmp_path / "whole", model, **settings)
    out = tmp_path / "cut" / "out"
    out.mkdir(parents=True)
    cut = make_spec(tmp_path / "cut", model=model, **settings)
    (out / "stop").touch()
    assert run(cut, out)[0] == EXIT_STOPPED
    (out / "stop").unlink()

    assert losses(run(cut, out)[1]) == pytest.approx(losses(whole), rel=1e-5)


def test_every_weight_may_train_on_from_a_whole_model_or_from_an_adapter_in_its_base(
    model: Path, tmp_path: Path, tuned: Path
) -> None:
    before = last_loss(model, tmp_path / "before", tuned)
    full = {"adapter": {"method": "full"}, "training": STILL}

    code, events = train(tmp_path / "whole", model, **full, **parent(tuned, "merged"))
    assert code == EXIT_DONE, events[-1]
    assert losses(events)[1] == pytest.approx(before, rel=1e-5)
    whole = product_of(tmp_path / "whole")
    code, events = train(tmp_path / "on", model, **full, **parent(whole, "continue", method="full"))

    assert code == EXIT_DONE, events[-1]
    assert losses(events)[1] == pytest.approx(before, rel=1e-5)
    difference = (answered(model, product_of(tmp_path / "on"), whole=True) - answered(model, tuned)).abs().max()
    assert difference < 1e-3


def test_weights_of_another_shape_end_the_job_by_name(model: Path, tmp_path: Path, tuned: Path) -> None:
    code, events = train(tmp_path, model, adapter={"r": 8}, **parent(tuned, "continue"))

    assert code == EXIT_USER_FAULT
    assert (events[-1].code, events[-1].param) == ("parent_does_not_fit", "model")


def test_magnitudes_cannot_stay_beneath_a_new_adapter(model: Path, tmp_path: Path, tuned: Path) -> None:
    odd = tmp_path / "odd"
    odd.mkdir()
    tensors = load_file(tuned / "adapter_model.safetensors")
    name = next(iter(tensors)).replace("lora_A", "lora_magnitude_vector")
    save_file({**tensors, name: torch.ones(3)}, odd / "adapter_model.safetensors")
    (odd / "adapter_config.json").write_text((tuned / "adapter_config.json").read_text())

    code, events = train(tmp_path, model, **parent(odd, "merged"))

    assert code == EXIT_USER_FAULT
    assert events[-1].code == "parent_not_plain"
