"""What our kernels compute on a CPU is what upstream's operators compute, values and gradients; else they stay away."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from shared.contract.compiled import PROCESSOR_KERNELS
from shared.contract.events import EXIT_DONE
from tests.patience import patience
from tests.train.families import make_family
from tests.train.tiny import losses, make_spec, run
from worker.train import cpu_kernels, row_attention
from worker.train.cpu_parts import Nll, use_kernels
from worker.train.objectives.supervised import labelled_nll
from worker.train.plain_parts import BY_KERNELS

needs_compiler = pytest.mark.skipif(cpu_kernels.load() is None, reason="no C compiler here: torch's operators serve")
TYPES = pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
LENGTHS = (37, 1, 20)


@pytest.fixture
def anew() -> Iterator[None]:
    """The library is looked for again, before and after."""
    cpu_kernels._tried.clear()
    yield
    cpu_kernels._tried.clear()


def family(folder: Path, name: str, dtype: torch.dtype) -> Any:
    network = AutoModelForCausalLM.from_pretrained(
        make_family(folder, name), dtype=dtype, attn_implementation=row_attention.register()
    )
    return network.requires_grad_(requires_grad=False)


def outcome(network: Any) -> list[torch.Tensor]:
    """Logits of packed rows, and the gradient of what comes in."""
    numbers = torch.Generator().manual_seed(4)
    places = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    width = network.get_input_embeddings().weight
    rows = torch.randn(1, sum(LENGTHS), width.shape[1], generator=numbers).to(width.dtype).requires_grad_()
    logits = network(
        inputs_embeds=rows, position_ids=places, use_cache=False, **{row_attention.ROW_STARTS: starts}
    ).logits
    logits.float().square().sum().backward()
    assert rows.grad is not None
    return [logits.detach().float(), rows.grad.float()]


def near(ours: list[torch.Tensor], theirs: list[torch.Tensor], relative: float) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() <= relative * other.norm()


@needs_compiler
@TYPES
@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "qwen2", "mistral", "granite", "olmo2", "glm4", "ernie4_5", "smollm3"]
)
def test_a_family_answers_and_learns_as_upstreams(
    name: str, dtype: torch.dtype, relative: float, tmp_path: Path
) -> None:
    network = family(tmp_path, name, dtype)
    before = outcome(network)
    changed = use_kernels(network)
    again = use_kernels(network)

    near(outcome(network), before, relative)
    assert again == 0
    assert changed > 0


@needs_compiler
def test_norms_gates_and_attentions_of_llama_are_changed_and_a_copy_stays_whole(model: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(model)

    assert use_kernels(network) == 5 + 2 + 2
    twin = copy.deepcopy(network)
    kinds = {type(module).__name__ for module in twin.modules() if hasattr(type(module), BY_KERNELS)}
    assert kinds == {"CompiledLlamaRMSNorm", "CompiledLlamaMLP", "CompiledLlamaAttention"}
    assert isinstance(twin.model.norm, LlamaRMSNorm)


@needs_compiler
def test_what_is_another_function_is_left_alone() -> None:
    def gelu(kind: Any, **more: Any) -> Any:
        return kind(_config(**more))

    for module in (gelu(Gemma3MLP, hidden_activation="gelu_pytorch_tanh"), gelu(LlamaMLP, hidden_act="gelu")):
        assert use_kernels(module) == 0


def _config(**more: Any) -> Any:
    return SimpleNamespace(hidden_size=8, intermediate_size=16, mlp_bias=False, **more)


@needs_compiler
def test_a_norm_that_learns_gets_its_gradient_from_upstream() -> None:
    norm = LlamaRMSNorm(48)
    assert use_kernels(norm) == 1
    rows = torch.randn(3, 48)

    norm(rows).square().sum().backward()

    assert norm.weight.grad is not None
    assert norm.weight.grad.abs().sum() > 0


@needs_compiler
@TYPES
def test_the_loss_is_that_of_torchs_operators(dtype: torch.dtype, relative: float) -> None:
    numbers = torch.Generator().manual_seed(5)
    logits = (torch.randn(9, 700, generator=numbers) * 4).to(dtype)
    targets = torch.randint(700, (9,), generator=numbers)
    logits[0, targets[0]] = 30.0  # right
    logits[1, :] = 1.0  # as likely as all others: the first one is taken
    targets[1] = 0
    logits[2, :], targets[2] = 1.0, 5
    outcomes = []
    for loss in (Nll.apply, labelled_nll):
        given = logits.clone().requires_grad_()
        nll, correct = loss(given, targets)
        (nll / 7).backward()
        outcomes.append((nll.detach(), given.grad, int(correct)))
    ours, theirs = outcomes

    near(list(ours[:2]), list(theirs[:2]), relative)
    assert ours[2] == theirs[2] >= 2


@needs_compiler
def test_a_loss_that_is_no_number_stays_none() -> None:
    logits = torch.zeros(2, 40)
    logits[1, 3] = float("nan")

    nll, _ = Nll.apply(logits, torch.tensor([1, 2]))

    assert bool(nll.isnan())


@needs_compiler
def test_rows_and_threads_change_no_bit(model: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, attn_implementation=row_attention.register()
    ).requires_grad_(requires_grad=False)
    use_kernels(network)
    norm, rows = network.model.norm, torch.randn(64, 64, dtype=torch.bfloat16)

    alone = torch.cat([norm(row[None]) for row in rows])
    assert torch.equal(norm(rows), alone)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(norm(rows), alone)
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize(
    ("adapter", "dtype", "near_enough"),
    [("qlora", "bfloat16", 0.01), ("lora", "float32", 1e-4), ("full", "float32", 1e-4), ("full", "bfloat16", 0.01)],
)
def test_a_run_learns_as_without_them(
    model: Path, tmp_path: Path, adapter: str, dtype: str, near_enough: float
) -> None:
    curves = []
    for left_out in ([], ["cpu_kernels"]):
        place = tmp_path / str(len(curves))
        training = {"num_train_epochs": 1, "learning_rate": 0.001, "dtype": dtype}
        spec = make_spec(place, model=model, adapter={"method": adapter}, training=training, without=left_out)
        code, events = run(spec, place / "out")
        assert code == EXIT_DONE, events[-1]
        curves.append(losses(events))

    assert curves[0] == pytest.approx(curves[1], rel=near_enough)
    assert curves[0] != curves[1] or dtype == "float32"


def _no_compiler(_name: str) -> None:
    return None


def _broken(library: Any) -> Any:
    raise cpu_kernels.Unfit("the compiled kernels give other numbers")


@pytest.mark.parametrize(
    ("name", "instead", "words"),
    [
        ("shutil.which", _no_compiler, "there is no C compiler (gcc)"),
        ("_check", _broken, "give other numbers"),
        ("FLAGS", ("--no-such-flag",), "does not compile"),
    ],
)
@pytest.mark.usefixtures("anew")
def test_without_a_library_torchs_operators_serve_and_the_log_says_why(  # noqa: PLR0917 -- pytest
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: Path,
    name: str,
    instead: Callable[..., Any],
    words: str,
) -> None:
    if name != "shutil.which" and shutil.which("gcc") is None:
        pytest.skip("no C compiler here")
    monkeypatch.setattr(f"worker.train.cpu_kernels.{name}", instead)
    network = AutoModelForCausalLM.from_pretrained(model)

    assert use_kernels(network) == 0
    assert type(network.model.norm) is LlamaRMSNorm
    assert words in capsys.readouterr().out


@needs_compiler
@pytest.mark.usefixtures("anew")
def test_what_was_compiled_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cpu_kernels.load(tmp_path) is not None
    (library,) = (tmp_path / PROCESSOR_KERNELS).iterdir()

    cpu_kernels._tried.clear()
    monkeypatch.setattr(cpu_kernels.subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))

    assert cpu_kernels.load(tmp_path) is not None
    assert list((tmp_path / PROCESSOR_KERNELS).iterdir()) == [library]


@needs_compiler
def test_small_numbers_are_flushed_by_no_flag_of_ours() -> None:
    code = (
        "import torch; from worker.train import cpu_kernels; assert cpu_kernels.load(); "
        "print(float(torch.tensor(1e-39) * 0.5), end='')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=patience(60)
    )

    assert float(done.stdout) > 0
