"""`target_modules: "experts"`: every expert gets an adapter of its own, which plain PEFT loads and a merge keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bench.families import look
from shared.contract.events import EXIT_DONE, EXIT_USER_FAULT
from shared.contract.spec import AttemptSpec
from shared.settle.model_facts import facts_of
from shared.settle.sizing import estimate
from shared.settle.workload import workload
from tests.train.families import make_config, make_family
from tests.train.tiny import chat_rows, losses, make_spec, run
from worker.train.base_model import load_model

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's remarks on tiny models


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text", "nemotron_h"])
def test_adapted_experts_learn_load_in_plain_peft_and_merge_with_the_same_logits(family: str, tmp_path: Path) -> None:
    seen = look(family, tmp_path, target_modules="experts")

    assert seen.refused == ""
    assert seen.right, seen
    tensors = load_file(tmp_path / "lora" / "out" / "adapter" / "adapter_model.safetensors")
    learned = [name for name, tensor in tensors.items() if ".experts." in name and "lora_B" in name and tensor.any()]
    assert len(learned) >= 2
    assert not [name for name in tensors if "router" in name or ".gate." in name]
    assert "stay frozen" not in "".join(seen.notes)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_recomputed_activations_change_nothing_for_adapted_experts(checkpointing: bool, tmp_path: Path) -> None:
    base = make_family(tmp_path, "qwen3_moe")
    settings: dict[str, Any] = {"model": base, "adapter": {"target_modules": "experts"}, "rows": chat_rows(8)}
    _, plain = run(make_spec(tmp_path / "plain", **settings), tmp_path / "plain" / "out")

    spec = make_spec(tmp_path / "again", **settings, gradient_checkpointing=checkpointing)
    _, again = run(spec, tmp_path / "again" / "out")

    assert losses(again) == pytest.approx(losses(plain), rel=1e-4)


def test_experts_of_a_base_that_has_none_are_refused(model: Path, tmp_path: Path) -> None:
    code, events = run(make_spec(tmp_path, model=model, adapter={"target_modules": "experts"}), tmp_path / "out")

    assert (code, events[-1].code) == (EXIT_USER_FAULT, "target_modules_not_found")


def test_on_a_4_bit_base_experts_stay_in_16_bits_and_the_estimate_says_so(tmp_path: Path) -> None:
    base = make_family(tmp_path, "qwen3_moe", num_experts=32, moe_intermediate_size=128)
    config = make_config("qwen3_moe", num_experts=32, moe_intermediate_size=128).to_dict()
    facts = facts_of(config | {"architectures": ["Qwen3MoeForCausalLM"]}, name="tiny")
    spec = AttemptSpec.model_validate_json(
        make_spec(
            tmp_path,
            model=base,
            adapter={"method": "qlora"},
            training={"dtype": "bfloat16"},
            facts=facts.model_dump(),
        ).read_bytes()
    )

    loaded = load_model(spec, weights=base, quantized=True, trains_in_full=False)

    experts = {name: one for name, one in loaded.named_parameters() if ".experts." in name}
    held = sum(one.numel() * one.element_size() for one in experts.values())
    assert {one.dtype for one in experts.values()} == {torch.bfloat16}
    terms = estimate(workload(spec.job, device="cpu", memory=1 << 34)).terms
    assert terms["experts in 16 bits"] == held
    standing = sum(one.numel() * one.element_size() for one in loaded.parameters()) - held
    assert terms["weights"] == pytest.approx(standing, rel=0.25)


def test_the_adapter_of_experts_has_the_size_that_was_told_before(tmp_path: Path) -> None:
    config = make_config("qwen3_moe").to_dict() | {"architectures": ["Qwen3MoeForCausalLM"]}
    facts = facts_of(config, name="tiny").model_dump()
    base = make_family(tmp_path, "qwen3_moe")
    spec = make_spec(tmp_path, model=base, adapter={"target_modules": "experts"}, facts=facts)
    job = AttemptSpec.model_validate_json(spec.read_bytes()).job

    code, events = run(spec, tmp_path / "out")

    assert code == EXIT_DONE
    trained = next(event.trainable_parameters for event in events if event.type == "started")
    assert estimate(workload(job, device="cpu", memory=1 << 34)).terms["trained weights"] == 4 * trained
