from __future__ import annotations

import inspect
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from tests.train.tiny import chat_rows, losses, make_spec, run
from worker.train import row_attention
from worker.train.data import Ids, TokenRow
from worker.train.objectives.supervised import packed, row_starts
from worker.train.packing import StepPlan, pack
from worker.train.plain_parts import sixteen_bits


@given(st.lists(st.integers(1, 100), max_size=40), st.integers(1, 100))
def test_packing_loses_no_row_and_overfills_no_sequence(lengths: list[int], capacity: int) -> None:
    bins = pack(lengths, capacity=capacity)

    assert sorted(index for one in bins for index in one) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in one) <= capacity or len(one) == 1 for one in bins)


@given(rows=st.integers(1, 50), batch_size=st.integers(1, 20), epochs=st.integers(1, 4))
def test_every_epoch_visits_every_row_once_in_full_batches(rows: int, batch_size: int, epochs: int) -> None:
    plan = StepPlan(rows=rows, batch_size=batch_size, epochs=epochs, max_steps=None, seed=3)

    visits = Counter(row for step in range(plan.total_steps) for row in plan.row_indices(step))

    assert set(visits.values()) == {epochs}
    assert plan.total_steps == epochs * -(-rows // batch_size)


def test_the_order_of_rows_follows_from_the_seed_alone() -> None:
    def order(seed: int) -> list[tuple[int, ...]]:
        plan = StepPlan(rows=20, batch_size=6, epochs=2, max_steps=None, seed=seed)
        return [tuple(plan.row_indices(step)) for step in range(plan.total_steps)]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1)[:4] != order(1)[4:]


def row_of(ids: Ids) -> TokenRow:
    return TokenRow(ids=ids, labelled=ids > -1)


@pytest.mark.parametrize("attention", ["sdpa", "eager", row_attention.register()])
def test_no_token_attends_to_another_row_of_its_sequence(model: Path, attention: str) -> None:
    network = AutoModelForCausalLM.from_pretrained(model, attn_implementation=attention).eval()
    first, other, second = (torch.randint(4, 200, (size,)).numpy().astype("int32") for size in (9, 9, 7))

    def logits(*rows: Ids) -> torch.Tensor:
        inputs = packed([row_of(ids) for ids in rows]).inputs
        with torch.no_grad():
            starts = {row_attention.ROW_STARTS: row_starts(inputs["position_ids"])}
            reads = {name: inputs[name] for name in ("input_ids", "position_ids")}
            return network(**reads, **starts, use_cache=False).logits[0]

    torch.testing.assert_close(logits(first, second)[9:], logits(other, second)[9:])
    torch.testing.assert_close(logits(first, second)[9:], logits(second), rtol=1e-4, atol=1e-5)


MORE: dict[str, dict[str, int]] = {
    "causal": {},
    "with a window that hides tokens": {"sliding_window": 4},
    "with a window that hides none": {"sliding_window": 12},
}


@pytest.mark.parametrize("road", [row_attention.by_products, row_attention.by_kernel])
@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
def test_attention_row_by_row_is_the_masked_one_with_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, int], road: Any
) -> None:
    by_row = Mock(side_effect=road)
    monkeypatch.setattr(row_attention, "BY_ROW", {"cpu": by_row})
    torch.manual_seed(5)
    lengths, heads = [5, 1, 12, 7], 4
    queries, keys, values = (
        torch.randn(1, count, sum(lengths), 8, requires_grad=True) for count in (heads, heads // 2, heads // 2)
    )
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (row[:, None] == row[None, :]).tril()[None, None]
    starts = torch.tensor([0, 5, 6, 18, 25])

    outcomes = []
    for packed_rows in ({}, {row_attention.ROW_STARTS: starts}):
        seen, _ = row_attention.attend(module, queries, keys, values, mask, scaling=0.3, **packed_rows, **more)
        gradients = torch.autograd.grad(seen.square().sum(), (queries, keys, values))
        outcomes.append((seen.detach(), *gradients))

    for apart, masked in zip(*outcomes, strict=True):
        torch.testing.assert_close(apart, masked, rtol=1e-4, atol=1e-5)
    assert by_row.call_count == (0 if more.get("sliding_window") == 4 else 1)


def rows_apart(  # noqa: PLR0917 -- as torch has it
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    **named: Any,
) -> torch.Tensor:
    """What torch's kernel answers, by its documentation, for the arguments that we give it. It runs on GPUs alone."""
    inspect.signature(varlen_attn).bind(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **named)
    assert (cu_seq_q.dtype, cu_seq_k.dtype) == (torch.int32, torch.int32)
    assert named["window_size"] == (-1, 0), "causal"
    assert named["enable_gqa"] == (query.shape[1] != key.shape[1])
    lengths = cu_seq_q.diff().tolist()
    assert max_q == max_k == max(lengths)
    rows = zip(*(part.transpose(0, 1).split(lengths, dim=1) for part in (query, key, value)), strict=True)
    seen = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=named["scale"], enable_gqa=named["enable_gqa"])
        for q, k, v in rows
    ]
    return torch.cat(seen, dim=1).transpose(0, 1)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_all_rows_in_one_call_of_the_flash_kernel_are_the_masked_ones(
    monkeypatch: pytest.MonkeyPatch, key_heads: int
) -> None:
    monkeypatch.setattr(row_attention, "varlen_attn", rows_apart)
    monkeypatch.setattr(row_attention, "varlen_serves", lambda *_parts: True)
    torch.manual_seed(5)
    lengths, heads = [5, 1, 12, 7], 4
    parts = [torch.randn(1, count, sum(lengths), 8, requires_grad=True) for count in (heads, key_heads, key_heads)]
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = heads // key_heads, True
    starts = torch.tensor([0, 5, 6, 18, 25])
    apart = {row_attention.ROW_STARTS: starts}

    outcomes = []
    for on_device in ({}, {row_attention.STARTS_ON_DEVICE: starts.int()}):
        seen, _ = row_attention.attend(module, *parts, None, scaling=0.3, **apart, **on_device)
        outcomes.append((seen.detach(), *torch.autograd.grad(seen.square().sum(), parts)))

    for one_call, by_row in zip(*outcomes, strict=True):
        torch.testing.assert_close(one_call, by_row, rtol=1e-4, atol=1e-5)


def test_the_flash_kernel_is_not_asked_for_what_it_cannot_do() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        query = torch.zeros(1, 2, 3, 8, dtype=dtype)
        assert not row_attention.varlen_serves(query, query, query)  # no GPU


def on_a_gpu(size: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """So much of a tensor on a GPU as is looked at."""
    return SimpleNamespace(device=torch.device("cuda"), shape=(1, 4, 7, size), dtype=dtype)


@pytest.mark.parametrize(
    ("sizes", "dtypes", "capability", "served"),
    [
        ((128, 128, 128), ("bfloat16",) * 3, (9, 0), True),
        ((192, 192, 128), ("bfloat16",) * 3, (9, 0), False),  # DeepSeek's latent attention
        ((128, 128, 128), ("bfloat16", "bfloat16", "float32"), (9, 0), False),
        ((128, 128, 128), ("float16",) * 3, (7, 5), False),
        ((512, 512, 512), ("bfloat16",) * 3, (9, 0), False),
    ],
)
def test_the_flash_kernel_has_one_size_of_a_head_and_one_type(
    monkeypatch: pytest.MonkeyPatch, sizes: Any, dtypes: Any, capability: tuple[int, int], served: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(row_attention, "kernel_agrees", lambda *_: True)
    parts = [on_a_gpu(size, getattr(torch, dtype)) for size, dtype in zip(sizes, dtypes, strict=True)]

    assert row_attention.varlen_serves(*parts) is served


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_kernels_are_tried_in_the_type_that_a_gpu_computes_in(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)

    assert sixteen_bits(torch.device("cuda")) == dtype
    assert sixteen_bits(torch.device("cpu")) == torch.bfloat16


def no_kernel(*_: Any, **__: Any) -> torch.Tensor:
    raise RuntimeError("CUDA error: no kernel image is available")


def older_torch(*_: Any, **__: Any) -> torch.Tensor:
    raise TypeError("varlen_attn() got an unexpected keyword argument 'enable_gqa'")


def another_scale(*given: torch.Tensor, **named: Any) -> torch.Tensor:
    return rows_apart(*given, **named) * 1.5


@pytest.mark.parametrize(
    ("kernel", "words"),
    [(rows_apart, ""), (no_kernel, "no kernel image"), (older_torch, "enable_gqa"), (another_scale, "other numbers")],
)
@pytest.mark.parametrize("shape", [(4, 2, 8), (2, 2, 16)])
def test_a_flash_kernel_that_fails_its_try_is_not_used_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kernel: Any,
    words: str,
    shape: tuple[int, int, int],
) -> None:
    monkeypatch.setattr(row_attention, "varlen_attn", kernel)
    before = torch.get_rng_state()

    assert row_attention.kernel_agrees.__wrapped__(torch.device("cpu"), torch.bfloat16, shape) is (words == "")
    assert words in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), before)


def test_packed_and_unpacked_runs_follow_the_same_curve(model: Path, tmp_path: Path) -> None:
    curves = []
    for packing in (True, False):
        spec = make_spec(tmp_path / str(packing), model=model, training={"packing": packing})
        code, events = run(spec, tmp_path / str(packing) / "out")
        assert code == 0
        curves.append(losses(events))

    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_a_smaller_micro_batch_leaves_the_curve_as_it_was(model: Path, tmp_path: Path) -> None:
    curves = []
    for rows_at_once in (4, 1):
        folder = tmp_path / str(rows_at_once)
        spec = make_spec(
            folder, model=model, rows=chat_rows(10), training={"packing": False}, micro_batch_size=rows_at_once
        )
        curves.append(losses(run(spec, folder / "out")[1]))

    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_fewer_tokens_a_pass_are_more_passes_and_the_same_curve(model: Path, tmp_path: Path) -> None:
    """What is tried after memory ran out on packed rows; a row longer than the bound has a pass of its own."""
    told = {}
    for bound in (None, 16):
        folder = tmp_path / str(bound)
        code, events = run(make_spec(folder, model=model, pass_tokens=bound), folder / "out")
        assert code == 0, events[-1]
        told[bound] = events

    sequences = {bound: next(event.sequences for event in told[bound] if event.type == "started") for bound in told}
    assert sequences[16] > sequences[None]
    assert losses(told[16]) == pytest.approx(losses(told[None]), rel=1e-4)
