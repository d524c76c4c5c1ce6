"""Mixtures of experts train: their routers' balancing loss is off, on every road and for every objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft.utils.save_and_load import load_peft_weights

from shared.contract.events import EXIT_DONE
from tests.train.families import make_family
from tests.train.fused_road import take_the_fused_road
from tests.train.tiny import chat_rows, kto_rows, losses, make_spec, preference_rows, run

# PEFT looks for the experts' ranks among modules, and finds them among parameters.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")

FAMILIES = ("qwen3_moe", "mixtral")
SAID = "The balancing loss of the experts' routers is off: they keep the balance that the base has."


@pytest.mark.parametrize("road", ["cpu", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_of_experts_learns_and_says_that_its_balancing_loss_is_off(
    family: str, road: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the base's own config asks for router logits."""
    if road == "fused":
        take_the_fused_road(monkeypatch.setattr)
    base = make_family(tmp_path, family, output_router_logits=True, router_aux_loss_coef=0.1)

    code, events = run(make_spec(tmp_path, model=base, rows=chat_rows(8)), tmp_path / "out")

    assert code == EXIT_DONE
    curve = losses(events)
    assert curve[max(curve)] < curve[1] - 0.3
    messages = [event.message for event in events if event.type == "message"]
    assert messages[0] == SAID
    assert messages[1].startswith("The experts stay frozen")


def test_the_loss_of_experts_is_the_same_on_a_cpu_and_on_the_road_of_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_family(tmp_path, "qwen3_moe")
    settings: dict[str, Any] = {"model": base, "rows": chat_rows(8), "training": {"num_train_epochs": 1}}
    _, plain = run(make_spec(tmp_path / "cpu", **settings), tmp_path / "cpu" / "out")
    take_the_fused_road(monkeypatch.setattr)
    _, fused = run(make_spec(tmp_path / "fused", **settings), tmp_path / "fused" / "out")

    assert losses(fused) == pytest.approx(losses(plain), rel=1e-4)


@pytest.mark.parametrize(("objective", "rows"), [("dpo", preference_rows(4)), ("kto", kto_rows(4))])
def test_preferences_of_a_mixture_of_experts_take_real_steps(objective: str, rows: Any, tmp_path: Path) -> None:
    base = make_family(tmp_path, "mixtral", output_router_logits=True)
    told = {
        "rows": rows,
        "data_format": "preference" if objective == "dpo" else "kto",
        "objective": {"type": objective},
    }

    code, events = run(make_spec(tmp_path, model=base, **told), tmp_path / "out")

    assert code == EXIT_DONE
    assert len(losses(events)) == 2
    learned = load_peft_weights(str(tmp_path / "out" / "adapter"), device="cpu")
    assert any(bool(tensor.any()) for name, tensor in learned.items() if "lora_B" in name)


def test_a_base_without_experts_says_nothing_of_routers(model: Path, tmp_path: Path) -> None:
    _, events = run(make_spec(tmp_path, model=model), tmp_path / "out")

    assert [event for event in events if event.type == "message"] == []
