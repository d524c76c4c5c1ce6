"""One kernel updates all weights on a GPU. torch has it for CPUs too, so what it computes is tried here."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from shared.contract.events import EXIT_DONE
from shared.contract.spec import AttemptSpec
from tests.train.interrupted import interrupt
from tests.train.tiny import losses, make_spec, run
from worker.train.objectives import objective
from worker.train.objectives.objective import optimizer_for

STEPS = {"num_train_epochs": 2, "learning_rate": 0.005, "weight_decay": 0.1}


def spec_of(folder: Path, **parts: object) -> AttemptSpec:
    return AttemptSpec.model_validate_json(make_spec(folder, model=folder, **parts).read_bytes())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "optim", "without", "name"),
    [
        ("cuda", "adamw_torch", [], "adamw_torch_fused"),
        ("cuda", "adamw_torch", ["fused_optimizer"], "adamw_torch"),
        ("cuda", "paged_adamw_8bit", [], "paged_adamw_8bit"),
        ("cpu", "adamw_torch", [], "adamw_torch"),
    ],
)
def test_torchs_adamw_is_fused_on_a_gpu_alone(
    tmp_path: Path, device: str, optim: str, without: list[str], name: str
) -> None:
    spec = spec_of(tmp_path, device=device, without=without, training={"optim": optim})

    assert optimizer_for(spec) == name


def fuse(monkeypatch: pytest.MonkeyPatch, *, on: bool) -> None:
    monkeypatch.setattr(objective, "optimizer_for", lambda _spec: "adamw_torch_fused" if on else "adamw_torch")


@pytest.mark.parametrize("adapter", [{"method": "lora"}, {"method": "lora", "loraplus_lr_ratio": 4.0}])
def test_the_fused_update_is_the_plain_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: dict[str, object]
) -> None:
    curves, weights = [], []
    for on in (False, True):
        fuse(monkeypatch, on=on)
        place = tmp_path / str(on)
        code, events = run(make_spec(place, model=model, adapter=adapter, training=STEPS), place / "out")
        assert code == EXIT_DONE, events[-1]
        curves.append(losses(events))
        weights.append(load_file(place / "out" / "adapter" / "adapter_model.safetensors"))

    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    for name, plain in weights[0].items():
        assert weights[1][name].numpy() == pytest.approx(plain.numpy(), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("first", "then"), [(True, False), (False, True)])
def test_a_job_goes_on_where_the_optimizer_has_the_other_kernel(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool, then: bool
) -> None:
    fuse(monkeypatch, on=False)
    unbroken = losses(run(make_spec(tmp_path / "whole", model=model, training=STEPS), tmp_path / "whole" / "out")[1])
    spec, out = make_spec(tmp_path / "broken", model=model, training=STEPS), tmp_path / "broken" / "out"

    fuse(monkeypatch, on=first)
    interrupt(spec, out, after=3, monkeypatch=monkeypatch)
    fuse(monkeypatch, on=then)
    code, events = run(spec, out)

    assert code == EXIT_DONE
    assert losses(events) == pytest.approx(unbroken, rel=1e-4)
