"""Stacks of experts in 4 bits: a quarter of the bytes, as reckoned; trained and merged as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

from shared.contract.events import EXIT_DONE
from shared.contract.merge_request import CreateMerge, MergeSpec
from shared.contract.spec import AttemptSpec, Quantization
from shared.settle.model_facts import facts_of
from shared.settle.sizing import estimate
from shared.settle.workload import workload
from tests.train.families import make_family
from tests.train.tiny import chat_rows, losses, make_spec, run
from worker.train.base_model import four_bit, load_model
from worker.train.description import built
from worker.train.merge import merge
from worker.train.rounding import round_to_4_bits
from worker.train.targets import expert_stacks

pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")

PACKED = {"load_experts_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}
MIXTURES = ["qwen3_moe", "mixtral", "glm4_moe", "llama4_text", "minimax_m2", "olmoe", "nemotron_h"]


def spec_of(folder: Path, base: Path, **more: Any) -> Path:
    """A QLoRA job on a mixture whose experts are in 4 bits too."""
    facts = facts_of(json.loads((base / "config.json").read_text()), name="tiny", build=built(base))
    quantization = PACKED | more.pop("quantization", {})
    return make_spec(
        folder, model=base, adapter={"method": "qlora"}, quantization=quantization, facts=facts.model_dump(), **more
    )


def load(spec: Path, base: Path) -> Any:
    return load_model(
        AttemptSpec.model_validate_json(spec.read_bytes()), weights=base, quantized=True, trains_in_full=False
    )


def tokens() -> torch.Tensor:
    return torch.randint(4, 260, (2, 24), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(tokens()).logits.float()


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_computes_with_the_values_of_its_4_bits(family: str, tmp_path: Path) -> None:
    base = make_family(tmp_path, family, initializer_range=0.2)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    apart = expert_stacks(plain)
    before = logits(plain)
    round_to_4_bits(plain, four_bit(Quantization.model_validate(PACKED)))

    packed = load(spec_of(tmp_path, base), base)

    assert expert_stacks(packed) == apart != {}
    torch.testing.assert_close(logits(packed), logits(plain), atol=2e-3, rtol=2e-3)
    assert (logits(packed) - before).abs().max() > 0.01, "rounding must matter"


def test_experts_take_the_bytes_that_were_reckoned(tmp_path: Path) -> None:
    base = make_family(tmp_path, "qwen3_moe", num_experts=32, moe_intermediate_size=128)
    file = spec_of(tmp_path, base)
    job = AttemptSpec.model_validate_json(file.read_bytes()).job

    loaded = load(file, base)

    held = 0
    for path, module in loaded.named_modules():
        if not path.endswith(".experts"):
            continue
        assert not list(module.named_parameters(recurse=False)), "a stack is there in 16 bits, too"
        for chain in module.parametrizations.values():
            state = chain[0].quant_state
            held += chain.original.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    terms = estimate(workload(job, device="cpu", memory=1 << 34)).terms
    assert terms["experts in 4 bits"] == pytest.approx(held, rel=0.01)
    assert held < 0.27 * 2 * sum(shape.numel() for shape in expert_stacks(loaded).values())


def test_a_job_on_packed_experts_learns_the_same_with_and_without_recomputing(tmp_path: Path) -> None:
    base = make_family(tmp_path, "qwen3_moe")
    curves = []
    for recompute in (False, True):
        folder = tmp_path / str(recompute)
        training = {"gradient_checkpointing": recompute, "num_train_epochs": 3}
        code, events = run(spec_of(folder, base, rows=chat_rows(8), training=training), folder / "out")
        assert code == EXIT_DONE
        curves.append(list(losses(events).values()))
        assert parametrize._cache_enabled == 0, "what was expanded would stay"

    assert curves[0][-1] < curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    said = [event.message for event in events if event.type == "message" and "experts stay frozen" in event.message]
    assert len(said) == 1


def test_a_model_merged_onto_the_packed_experts_answers_as_it_was_trained(tmp_path: Path) -> None:
    base = make_family(tmp_path, "qwen3_moe", initializer_range=0.2)
    file = spec_of(tmp_path / "job", base, rows=chat_rows(8))
    assert run(file, tmp_path / "out")[0] == EXIT_DONE
    adapter = next((tmp_path / "out").rglob("adapter_config.json")).parent
    job = AttemptSpec.model_validate_json(file.read_bytes()).job
    request = CreateMerge(adapter="ft:tiny", onto="dequantized")
    merging = MergeSpec(name="m", request=request, job=job, base_model_path=str(base), adapter_paths=[str(adapter)])

    merge(merging, tmp_path / "merged")

    trained = PeftModel.from_pretrained(load(file, base), str(adapter))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(trained), atol=5e-3, rtol=5e-3)
