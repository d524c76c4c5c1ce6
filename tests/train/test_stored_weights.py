"""A base that is published in MXFP4 or FP8 trains from its expanded weights, where that is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shared.contract.events import EXIT_DONE, EXIT_USER_FAULT
from shared.contract.merge_request import CreateMerge, MergeSpec
from shared.contract.spec import AttemptSpec
from shared.settle.model_facts import facts_of
from tests.train.families import make_family
from tests.train.tiny import losses, make_spec, run
from worker.train.merge import merge
from worker.train.product import make_product

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's remarks on tiny models

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def store(base: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> Path:
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}), encoding="utf-8")
    return base


def in_fp8(folder: Path) -> Path:
    base = make_family(folder, "llama")
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if "proj" in name]:
        scale = tensors[name].abs().max() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[name.replace(".weight", ".weight_scale_inv")] = scale.reshape(1, 1)
    return store(base, tensors, FP8)


def in_mxfp4(folder: Path) -> Path:
    """As gpt-oss is published: blocks of 32 values in 4 bits with one exponent each."""
    base = make_family(folder, "gpt_oss")
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*blocks, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.full(blocks, 122, dtype=torch.uint8)
    return store(base, tensors, MXFP4)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        seen: torch.Tensor = model.eval()(torch.arange(20)[None] + 4).logits.float()
    return seen


@pytest.mark.parametrize("publish", [in_fp8, in_mxfp4])
def test_a_base_in_fewer_bits_is_refused_unless_it_is_to_be_expanded(publish: Any, tmp_path: Path) -> None:
    base = publish(tmp_path)

    code, events = run(make_spec(tmp_path / "plain", model=base), tmp_path / "plain" / "out")

    assert (code, events[-1].param) == (EXIT_USER_FAULT, "quantization.dequantize")
    assert "dequantize to true" in events[-1].message


def test_a_full_fine_tune_of_expanded_experts_is_a_plain_model_in_16_bits_or_more(tmp_path: Path) -> None:
    base = in_mxfp4(tmp_path)
    facts = facts_of(json.loads((base / "config.json").read_text(encoding="utf-8")), name="tiny").model_dump()
    settings = {"max_steps": 1, "learning_rate": 1e-4}
    spec = make_spec(
        tmp_path / "job",
        model=base,
        adapter={"method": "full"},
        quantization={"dequantize": True},
        training=settings,
        facts=facts,
    )

    code, events = run(spec, tmp_path / "job" / "out")

    assert code == EXIT_DONE, events[-1]
    names = set(load_file(tmp_path / "job" / "out" / "adapter" / "model.safetensors"))
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"} <= names
    assert not [name for name in names if "blocks" in name]


@pytest.mark.parametrize("publish", [in_fp8, in_mxfp4])
def test_an_expanded_base_learns_and_its_adapter_merges_into_a_plain_model(publish: Any, tmp_path: Path) -> None:
    base = publish(tmp_path)
    facts = facts_of(json.loads((base / "config.json").read_text(encoding="utf-8")), name="tiny").model_dump()
    spec = make_spec(tmp_path / "job", model=base, quantization={"dequantize": True}, facts=facts)

    code, events = run(spec, tmp_path / "job" / "out")

    assert code == EXIT_DONE, events[-1]
    curve = losses(events)
    assert curve[max(curve)] < curve[1] - 0.1
    adapter = str(tmp_path / "job" / "out" / "adapter")
    job = AttemptSpec.model_validate_json(spec.read_bytes()).job
    request = CreateMerge(adapter="ft:tiny", onto="base")
    asked = MergeSpec(name="m", request=request, job=job, base_model_path=str(base), adapter_paths=[adapter])
    (tmp_path / "merge.json").write_text(asked.model_dump_json(), encoding="utf-8")
    assert make_product(merge, spec_file=tmp_path / "merge.json", out=tmp_path / "merged") == 0
    merged = tmp_path / "merged" / "product"
    assert "quantization_config" not in json.loads((merged / "config.json").read_text(encoding="utf-8"))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    seen = logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32))
    assert (seen - logits(plain)).abs().max() < 0.02 * seen.abs().max()
