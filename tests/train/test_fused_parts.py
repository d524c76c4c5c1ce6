"""SwiGLU and rotary embeddings by Triton's kernels are upstream's, in every class that is changed.

The kernels run in Triton's interpreter, where this PyTorch came with Triton; a GPU was not at hand. What is around them
is tried with kernels that compute as they are documented.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

from shared.contract.events import EXIT_DONE
from shared.contract.spec import AttemptSpec
from tests.train.families import make_family
from tests.train.tiny import losses, make_spec, read_events, run
from worker.train import __main__ as program
from worker.train import gpu_parts
from worker.train.gpu_parts import fuse_parts
from worker.train.plain_parts import BY_KERNELS

SOURCE = Path(gpu_parts.__file__).with_name("gpu_kernels.py")


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ModuleType]:
    """The module of the kernels, as Triton's interpreter runs it."""
    pytest.importorskip("triton", reason="this PyTorch came without Triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        described = importlib.util.spec_from_file_location("interpreted_kernels", SOURCE)
        assert described is not None
        assert described.loader is not None
        made = importlib.util.module_from_spec(described)
        described.loader.exec_module(made)
        yield made


class Documented(ModuleType):
    """What the kernels are documented to compute, by torch's operators; notes its calls."""

    def __init__(self) -> None:
        super().__init__("documented")
        self.calls: list[str] = []
        self.Swiglu = SimpleNamespace(apply=self._swiglu)
        self.Rotary = SimpleNamespace(apply=self._rotary)

    def _swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        self.calls.append("swiglu")
        return (silu(gate.float()) * up.float()).to(gate.dtype)

    def _rotary(self, *parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append("rotary")
        query, key, cosine, sine = (part.float() for part in parts)
        turned = [gpu_parts._turned(part, cosine, sine).to(parts[0].dtype) for part in (query, key)]
        return turned[0], turned[1]


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch) -> Documented:
    made = Documented()
    monkeypatch.setattr(gpu_parts, "_kernels_of", lambda _device: made)
    return made


def numbers(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(dtype).requires_grad_()


TYPES = [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)]


@pytest.mark.parametrize(("dtype", "relative"), TYPES)
@pytest.mark.parametrize("shape", [(1, 7, 48), (2, 3, 5), (1, 1, 2500)])
def test_swiglu_and_its_gradients_are_those_of_float64(
    interpreted: ModuleType, shape: tuple[int, ...], dtype: torch.dtype, relative: float
) -> None:
    gate, up, grad = (numbers(*shape, dtype=dtype, seed=seed) for seed in (1, 2, 3))
    exact = [part.detach().double().requires_grad_() for part in (gate, up)]

    answer = interpreted.Swiglu.apply(gate, up)
    answer.backward(grad.detach())
    expected = silu(exact[0]) * exact[1]
    expected.backward(grad.detach().double())

    for ours, theirs in ((answer, expected), (gate.grad, exact[0].grad), (up.grad, exact[1].grad)):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= relative * theirs.norm()


@pytest.mark.parametrize(("dtype", "relative"), TYPES)
@pytest.mark.parametrize("size", [16, 24, 128], ids=lambda size: f"heads of {size}")
@pytest.mark.parametrize("laid_out", [False, True], ids=["heads first", "places first, as projections give them"])
def test_turned_queries_and_keys_and_their_gradients_are_those_of_float64(
    interpreted: ModuleType, size: int, laid_out: bool, dtype: torch.dtype, relative: float
) -> None:
    def heads(count: int, seed: int) -> torch.Tensor:
        shape = (1, 5, count, size) if laid_out else (1, count, 5, size)
        return numbers(*shape, dtype=dtype, seed=seed)

    leaves = [heads(4, 1), heads(2, 2)]
    cosine, sine = (numbers(1, 5, size, dtype=dtype, seed=seed).detach() for seed in (3, 4))
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]

    def parts(of: list[torch.Tensor]) -> list[torch.Tensor]:
        return [leaf.transpose(1, 2) if laid_out else leaf for leaf in of]

    answers = interpreted.Rotary.apply(*parts(leaves), cosine, sine)
    expected = [gpu_parts._turned(part, cosine.double(), sine.double()) for part in parts(exact)]
    grads = [numbers(*answer.shape, dtype=dtype, seed=5 + at).detach() for at, answer in enumerate(answers)]
    torch.autograd.backward(answers, grads)
    torch.autograd.backward(expected, [grad.double() for grad in grads])

    pairs = [*zip(answers, expected, strict=True), *((a.grad, b.grad) for a, b in zip(leaves, exact, strict=True))]
    for ours, theirs in pairs:
        assert ours.dtype == dtype
        assert ours.shape == theirs.shape
        assert (ours.double() - theirs).norm() <= relative * theirs.norm()


def test_the_try_takes_the_kernels_as_they_are_and_refuses_those_that_give_other_numbers(
    interpreted: ModuleType,
) -> None:
    device = torch.device("cpu")
    wrong = SimpleNamespace(Swiglu=SimpleNamespace(apply=lambda gate, up: gate * up), Rotary=interpreted.Rotary)

    assert gpu_parts._agrees(interpreted, device)
    assert not gpu_parts._agrees(wrong, device)


def test_where_there_is_no_triton_upstreams_way_stays_and_the_log_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "worker.train.gpu_kernels", None)
    gpu_parts._kernels_of.cache_clear()

    assert gpu_parts._kernels_of(torch.device("cpu")) is None
    assert "are not used" in capsys.readouterr().out
    gpu_parts._kernels_of.cache_clear()


def of_a_gpu(folder: Path, model: Path, **parts: Any) -> AttemptSpec:
    file = make_spec(folder, model=model, device="cuda", **parts)
    return AttemptSpec.model_validate_json(file.read_bytes())


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3_text", "phi3", "gpt_neox", "granite"])
def test_a_family_computes_the_same_with_the_kernels(tmp_path: Path, family: str, documented: Documented) -> None:
    """Gemma's gate is no SiLU, and Phi's is one layer with up: those stay as they are."""
    folder = make_family(tmp_path / family, family)
    plain, ours = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    changed = fuse_parts(ours, of_a_gpu(tmp_path, folder))
    tokens = torch.arange(2, 26)[None]

    found = []
    for model in (plain, ours):
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        found.append((loss, torch.cat([part.grad.flatten() for part in model.parameters() if part.grad is not None])))

    assert ("swiglu" in documented.calls) == (family in {"llama", "qwen3", "mistral", "granite"})
    assert changed == sum(hasattr(type(part), BY_KERNELS) for part in ours.modules())
    for expected, given in zip(*found, strict=True):
        assert (given - expected).norm() <= 1e-5 * expected.norm()


def test_each_road_is_left_out_by_its_name_and_both_where_layers_are_spread(
    model: Path, tmp_path: Path, documented: Documented
) -> None:
    layers = 2

    def changed(**parts: Any) -> int:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return fuse_parts(AutoModelForCausalLM.from_pretrained(model), of_a_gpu(folder, model, **parts))

    assert changed() == 2 * layers
    assert changed(without=["fused_swiglu"]) == layers
    assert changed(without=["fused_rotary"]) == layers
    assert changed(without=["fused_swiglu", "fused_rotary"]) == 0
    assert changed(placement={"gpus": 2, "strategy": "fsdp"}) == 0


def test_a_job_that_trains_with_them_follows_the_curve_of_one_without(
    model: Path, tmp_path: Path, documented: Documented, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fused = tmp_path / "plain", tmp_path / "fused"
    settings: dict[str, Any] = {"model": model, "without": ["cpu_kernels"], "training": {"packing": True}}
    assert run(make_spec(plain, **settings), plain / "out")[0] == EXIT_DONE
    monkeypatch.setattr(
        program, "fuse_parts", lambda base, spec: fuse_parts(base, spec.model_copy(update={"device": "cuda"}))
    )

    code, events = run(make_spec(fused, **settings), fused / "out")

    assert code == EXIT_DONE
    assert {"swiglu", "rotary"} <= set(documented.calls)
    assert list(losses(events).values()) == pytest.approx(list(losses(read_events(plain / "out")).values()), rel=1e-4)
