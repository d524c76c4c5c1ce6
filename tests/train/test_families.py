"""Each family of base models trains right or is refused by a sentence; `bench/families.py` looks at all of them.

These few stand for the kinds: state along the sequence, experts, a tower for images, capped scores, fused projections.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
)

from bench.families import EVERY, SAME, look
from shared.contract.events import EXIT_DONE, EXIT_USER_FAULT
from shared.contract.families import CAUSAL_WRAPPERS
from shared.settle.model_facts import facts_of
from tests.train.families import make_config, make_family
from tests.train.tiny import chat_rows, make_spec, run
from worker.train.targets import expert_stacks, parts_beside

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's remarks on tiny models

MIXED = (
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo"),
    *("glm4_moe", "glm4_moe_lite", "gpt_oss", "granitemoe", "granitemoehybrid", "hunyuan_v1_moe", "jamba"),
    *("jetmoe", "lfm2_moe", "llama4_text", "minimax", "minimax_m2", "mixtral"),
    *("nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next"),
)
KINDS = ("deepseek_v3", "falcon_h1", "gemma3", "gpt_oss", "llama4_text", "mamba", "nemotron_h", "phi")


@pytest.mark.parametrize("family", KINDS)
def test_a_family_trains_packs_saves_loads_and_merges_right(family: str, tmp_path: Path) -> None:
    seen = look(family, tmp_path)

    assert seen.refused == ""
    assert seen.learns, seen
    assert seen.packing_off or (seen.packed is not None and seen.packed <= SAME), seen
    assert max(seen.loaded or 0, seen.merged or 0) <= SAME, seen
    assert seen.right, seen
    assert seen.four_bit or (family == "mamba" and "use method lora" in seen.four_bit_refused), seen


def adapted(tmp_path: Path, family: str, **adapter: Any) -> tuple[int, list[Any], set[str]]:
    """Exit code, events, and the names of the layers in the product of a job of one step."""
    base = make_family(tmp_path, family)
    spec = make_spec(tmp_path, model=base, rows=chat_rows(4), adapter=adapter, training={"max_steps": 1})
    code, events = run(spec, tmp_path / "out")
    product = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(product) if code == EXIT_DONE else {}
    return code, events, {name.removeprefix("base_model.model.").split(".lora_")[0] for name in tensors}


def messages(events: list[Any]) -> str:
    return "\n".join(event.message for event in events if event.type == "message")


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4_text", "qwen3_5_moe", "deepseek_v3"])
def test_experts_and_routers_stay_frozen_unless_they_are_asked_for(family: str, tmp_path: Path) -> None:
    code, events, layers = adapted(tmp_path, family)

    assert code == EXIT_DONE, events[-1]
    assert any(layer.endswith("o_proj") for layer in layers)
    assert not [
        layer for layer in layers if "expert" in layer.rsplit(".", 1)[-1] or layer.endswith((".gate", "router"))
    ]
    assert not [layer for layer in layers if layer.endswith(".experts")]
    assert "The experts stay frozen" in messages(events)


def test_a_tower_for_images_stays_frozen_and_the_user_is_told(tmp_path: Path) -> None:
    code, events, layers = adapted(tmp_path, "gemma3")

    assert code == EXIT_DONE, events[-1]
    assert layers
    assert all("language_model" in layer for layer in layers), layers
    assert "Only the language model is trained; model.vision_tower" in messages(events)


def test_names_given_by_hand_leave_the_tower_out_too(tmp_path: Path) -> None:
    _, _, layers = adapted(tmp_path, "gemma3", target_modules=["q_proj", "v_proj"])

    assert {layer.rsplit(".", 1)[-1] for layer in layers} == {"q_proj", "v_proj"}
    assert all("language_model" in layer for layer in layers), layers


def test_a_full_fine_tune_leaves_the_tower_as_it_is(tmp_path: Path) -> None:
    base = make_family(tmp_path, "gemma3")
    spec = make_spec(
        tmp_path, model=base, adapter={"method": "full"}, training={"max_steps": 1, "learning_rate": 0.001}
    )

    code, events = run(spec, tmp_path / "out")

    assert code == EXIT_DONE, events[-1]
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "adapter" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not [name for name in moved if "vision" in name or "projector" in name]


def test_a_name_that_upstream_would_read_as_all_experts_is_refused(tmp_path: Path) -> None:
    """The first layer of DeepSeek V3 is dense and has a gate_proj; PEFT would adapt every expert instead."""
    code, events, _ = adapted(tmp_path, "deepseek_v3", target_modules=["gate_proj", "up_proj"])

    assert code == EXIT_USER_FAULT
    assert (events[-1].code, events[-1].param) == ("unsupported_combination", "adapter.target_modules")
    assert "use experts" in events[-1].message


def test_a_router_given_by_name_is_refused(tmp_path: Path) -> None:
    code, events, _ = adapted(tmp_path, "llama4_text", target_modules=["q_proj", "router"])

    assert (code, events[-1].code) == (EXIT_USER_FAULT, "unsupported_combination")


def test_what_stands_beside_the_language_model_is_seen_in_wrappers_alone(tmp_path: Path) -> None:
    parts = {}
    for family in ("llama", "gpt2", "gpt_neox", "gemma3", "llama4_text"):
        base = make_family(tmp_path, family)
        parts[family] = parts_beside(AutoModelForCausalLM.from_pretrained(base))

    assert parts.pop("gemma3") == ["model.vision_tower", "model.multi_modal_projector"]
    assert set(map(tuple, parts.values())) == {()}


@pytest.mark.parametrize("family", EVERY)
def test_facts_of_every_family_are_read_from_its_config(family: str) -> None:
    config = make_config(family)
    said = json.loads(config.to_json_string()) | {"architectures": ["Some"]}

    facts = facts_of(said, name=family)

    text = config.get_text_config()
    assert (facts.hidden_size, facts.vocab_size) == (64, text.vocab_size)
    assert facts.num_hidden_layers == text.num_hidden_layers
    assert (facts.beside is not None) == (getattr(config, "vision_config", None) is not None)
    assert (facts.experts is not None) == (family in MIXED)


def test_the_wrappers_that_are_let_through_are_those_that_the_causal_class_takes() -> None:
    causal = {config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING}
    wrappers = {
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config].__name__
        for config in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        if config.model_type in causal
    }
    wrappers |= {MODEL_FOR_CAUSAL_LM_MAPPING[config].__name__ for config in MODEL_FOR_CAUSAL_LM_MAPPING}

    assert {name for name in wrappers if name.endswith("ForConditionalGeneration")} == CAUSAL_WRAPPERS


def test_stacks_of_experts_are_seen_by_their_shape_and_place(tmp_path: Path) -> None:
    base = make_family(tmp_path, "nemotron_h")
    facts = json.loads((base / "config.json").read_text(encoding="utf-8"))

    stacks = expert_stacks(AutoModelForCausalLM.from_pretrained(base))

    assert {path.rsplit(".", 1)[-1] for path in stacks} == {"up_proj", "down_proj"}
    assert {shape[0] for shape in stacks.values()} == {facts["n_routed_experts"]}


def test_the_page_of_families_has_a_right_line_for_each() -> None:
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")

    assert [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| ")][1:] == [
        *EVERY
    ]
    assert "CRASH" not in page
    assert "**wrong**" not in page
