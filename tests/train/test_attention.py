"""A base computes the attention that its class asks for, and packed rows do not see each other in it."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV32Config,
    Gemma2Config,
    LlamaConfig,
)

from shared.contract.events import EXIT_DONE, EXIT_USER_FAULT
from shared.contract.families import BLIND_TO_POSITIONS
from shared.contract.spec import AttemptSpec, DeviceKind
from tests.train.families import make_family
from tests.train.tiny import chat_rows, losses, make_spec, run
from worker.train import row_attention, row_leak
from worker.train.attention import attention_for
from worker.train.base_model import load_model
from worker.train.objectives.supervised import row_starts
from worker.train.sequence_state import carries_state, packed_only_apart

pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")


def test_attention_is_chosen_by_what_the_class_computes() -> None:
    devices: tuple[DeviceKind, ...] = ("cpu", "cuda")
    assert {attention_for(LlamaConfig(), device=device) for device in devices} == {"row_wise_sdpa"}
    assert {attention_for(DeepseekV32Config(), device=device) for device in devices} == {"sdpa"}
    assert attention_for(Gemma2Config(), device="cuda") == "flex_attention"
    assert attention_for(Gemma2Config(), device="cpu") == "eager"


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "deepseek_v32"])
def test_capped_scores_sinks_and_chosen_tokens_are_not_left_out(family: str, tmp_path: Path) -> None:
    base = make_family(tmp_path, family, initializer_range=1.0)
    spec = AttemptSpec.model_validate_json(make_spec(tmp_path, model=base).read_bytes())
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")

    loaded = load_model(spec, weights=base, quantized=False, trains_in_full=False)

    ids = torch.arange(30)[None] + 4
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)


def test_gemma_2_learns_the_same_from_packed_rows_as_from_rows_apart(tmp_path: Path) -> None:
    base = make_family(tmp_path, "gemma2")
    settings = {"model": base, "rows": chat_rows(8)}

    apart = run(make_spec(tmp_path / "apart", **settings, training={"packing": False}), tmp_path / "apart" / "out")
    packed = run(make_spec(tmp_path / "packed", **settings, packing_asked=True), tmp_path / "packed" / "out")

    assert (apart[0], packed[0]) == (EXIT_DONE, EXIT_DONE)
    assert next(event.sequences for event in packed[1] if event.type == "started") < 8
    assert losses(packed[1]) == pytest.approx(losses(apart[1]), rel=1e-3)


def test_rows_of_gpt_oss_are_trained_apart_and_the_user_is_told(tmp_path: Path) -> None:
    base = make_family(tmp_path, "gpt_oss")
    code, events = run(make_spec(tmp_path / "auto", model=base, rows=chat_rows(4)), tmp_path / "auto" / "out")
    refused, why = run(make_spec(tmp_path / "asked", model=base, packing_asked=True), tmp_path / "asked" / "out")

    assert code == EXIT_DONE
    assert next(event.sequences for event in events if event.type == "started") == 4
    told = [event.message for event in events if event.type == "message" and event.level == "warn"]
    assert [message for message in told if message.startswith("Packing")] == [
        "Packing is off: packed rows would leak into each other: the attention of gpt_oss does not look at positions."
    ]
    assert (refused, why[-1].param) == (EXIT_USER_FAULT, "tunepool.training.packing")


def test_a_family_that_nobody_listed_is_found_leaking_by_a_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.train.sequence_state.BLIND_TO_POSITIONS", frozenset())
    base = make_family(tmp_path, "gpt_oss")
    spec = AttemptSpec.model_validate_json(make_spec(tmp_path, model=base, packing_asked=True).read_bytes())
    model = load_model(spec, weights=base, quantized=False, trains_in_full=False)

    assert carries_state(model) is None
    with pytest.raises(Exception, match="leak into each other in GptOssForCausalLM, as a try with two rows shows"):
        packed_only_apart(spec, model, reporter=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma3_text", "mistral"])
def test_families_whose_packed_rows_stay_apart_pass_the_try(family: str, tmp_path: Path) -> None:
    base = make_family(tmp_path, family)
    implementation = attention_for(AutoConfig.from_pretrained(base), device="cpu")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation=implementation)

    assert row_leak.leak_between_rows(model) < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma3_text", "llama4_text", "cohere2", "falcon_h1"])
def test_the_road_of_a_gpu_gives_packed_rows_what_they_have_alone(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows below and above the window of 64 that some of these have; torch's own kernel row by row, as on CUDA."""
    monkeypatch.setattr(row_attention, "BY_ROW", {})
    base = make_family(tmp_path, family, initializer_range=0.5)
    name = attention_for(AutoConfig.from_pretrained(base), device="cuda")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation=name).eval()
    if carries_state(model) is not None:
        pytest.skip("its rows are never packed")
    ids = [torch.randint(4, 200, (1, length)) for length in (40, 100, 7)]

    def logits(*rows: torch.Tensor) -> torch.Tensor:
        positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
        apart = {row_attention.ROW_STARTS: row_starts(positions)}
        with torch.no_grad():
            return model(torch.cat(rows, dim=1), position_ids=positions, use_cache=False, **apart).logits[0]

    alone = torch.cat([logits(row) for row in ids])
    torch.testing.assert_close(logits(*ids), alone, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(row_attention, "longest", lambda *_given: 0)  # by the mask alone
    torch.testing.assert_close(logits(*ids), alone, atol=1e-4, rtol=1e-4)


def test_every_family_that_masks_without_positions_is_listed() -> None:
    blind = set()
    for config in MODEL_FOR_CAUSAL_LM_MAPPING:
        family = MODEL_FOR_CAUSAL_LM_MAPPING[config]
        source = inspect.getsource(sys.modules[family.__module__])
        masks = re.findall(r"mask_kwargs = \{(.*?)\}", source, re.DOTALL)
        masks += [one for one in re.findall(r"create_causal_mask\(([^)]+)\)", source) if "**" not in one]
        if any("position_ids" not in one for one in masks):
            blind.add(config.model_type)

    assert {"gpt_oss", "falcon", "opt"} <= blind
    assert blind <= BLIND_TO_POSITIONS
