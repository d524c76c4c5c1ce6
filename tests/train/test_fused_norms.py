"""Norms by torch's kernel are those of upstream, in every class that is changed; the others are left alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from shared.contract.events import EXIT_DONE
from tests.train.families import make_family
from tests.train.tiny import losses, make_spec, run
from worker.train import __main__ as program
from worker.train import fused_norms
from worker.train.fused_norms import fuse_norms

WIDE = 48


def norm_of(kind: type[Any], dtype: torch.dtype) -> Any:
    numbers = torch.Generator().manual_seed(1)
    norm = kind(WIDE, eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(WIDE, generator=numbers) + 0.5)
    return norm.to(dtype)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
def test_output_and_gradients_are_upstreams(kind: type[Any], dtype: torch.dtype, relative: float) -> None:
    plain = norm_of(kind, dtype)
    fused = copy.deepcopy(plain)
    assert fuse_norms(fused) == 1
    rows = torch.randn(3, 5, WIDE, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = []
    for norm in (plain, fused):
        given = rows.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            answer = norm(given)
        answer.float().square().sum().backward()
        found.append((answer, given.grad, norm.weight.grad))

    assert found[1][0].dtype == dtype
    for expected, ours in zip(*found, strict=True):
        assert (ours.float() - expected.float()).norm() <= relative * expected.float().norm()


@pytest.mark.parametrize("kind", [Gemma3RMSNorm, Qwen3NextRMSNormGated])
def test_a_norm_that_does_something_else_is_left_alone(kind: type[Any]) -> None:
    norm = kind(WIDE, eps=1e-6)

    assert fuse_norms(norm) == 0
    assert type(norm) is kind


@pytest.mark.parametrize("wrong", ["other numbers", "no kernel image"])
def test_a_kernel_that_fails_its_try_is_not_used_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    norm = LlamaRMSNorm(WIDE)
    assert fused_norms.is_plain(LlamaRMSNorm)

    def broken(rows: torch.Tensor, *_: Any) -> torch.Tensor:
        if wrong == "no kernel image":
            raise RuntimeError("CUDA error: no kernel image is available")
        return rows * 2

    monkeypatch.setattr(fused_norms, "rms_norm", broken)
    monkeypatch.setattr(fused_norms, "_kernel_agrees", fused_norms._kernel_agrees.__wrapped__)

    assert fuse_norms(norm) == 0
    assert type(norm) is LlamaRMSNorm
    assert wrong in capsys.readouterr().out


def test_a_copy_of_a_model_has_norms_of_its_own(model: Path) -> None:
    first = AutoModelForCausalLM.from_pretrained(model)
    assert fuse_norms(first) == 5  # two a layer, and the last one
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.model.norm.weight.zero_()

    rows = torch.ones(1, 64)
    assert first.model.norm(rows).abs().sum() > 0
    assert second.model.norm(rows).abs().sum() == 0
    assert isinstance(second.model.norm, LlamaRMSNorm)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "mistral", "olmo2", "granite", "glm4", "gemma2"])
def test_logits_of_a_family_are_those_of_upstream(family: str, tmp_path: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(make_family(tmp_path, family)).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = network(input_ids=ids).logits
        count = fuse_norms(network)
        after = network(input_ids=ids).logits

    assert (count > 0) == (family != "gemma2")
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "adapter", [{"method": "lora"}, {"method": "lora", "modules_to_save": ["norm"]}, {"method": "full"}]
)
def test_the_curve_is_that_of_upstreams_norms(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: dict[str, Any]
) -> None:
    build, counts, curves = program._build_objective, [], []

    def with_kernels(base: Any, *given: Any, **named: Any) -> Any:
        counts.append(fuse_norms(base))
        return build(base, *given, **named)

    for fused in (False, True):
        monkeypatch.setattr(program, "_build_objective", with_kernels if fused else build)
        place = tmp_path / str(fused)
        training = {"num_train_epochs": 1, "learning_rate": 0.001}
        code, events = run(make_spec(place, model=model, adapter=adapter, training=training), place / "out")
        assert code == EXIT_DONE, events[-1]
        curves.append(losses(events))

    assert counts == [5]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
