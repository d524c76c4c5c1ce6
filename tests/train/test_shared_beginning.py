"""A beginning that packed rows share is read once, and everything learns as if each row had read it by itself."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from shared.contract.events import EXIT_DONE
from shared.contract.spec import AttemptSpec
from tests.train.families import make_family
from tests.train.test_cpu_kernels import TYPES, near, needs_compiler
from tests.train.tiny import chat, losses, make_spec, run
from worker.train import cpu_attention, row_attention
from worker.train.cpu_parts import use_kernels
from worker.train.data import TokenRow
from worker.train.objectives.supervised import packed, row_starts
from worker.train.shared_beginning import LEAST, Beginnings, agrees, common_beginning, longest_sharing

BEGINNING = 19
LENGTHS = (30, 21, 52)  # of whole rows


def token_row(ids: Any, taught_from: int) -> TokenRow:
    ids = np.asarray(ids, dtype=np.int32)
    return TokenRow(ids=ids, labelled=np.arange(len(ids)) >= taught_from)


def rows_alike(vocabulary: int = 200) -> list[TokenRow]:
    numbers = np.random.default_rng(3)
    beginning = numbers.integers(4, vocabulary, BEGINNING)
    rests = (numbers.integers(4, vocabulary, length - BEGINNING) for length in LENGTHS)
    rows = [token_row(np.concatenate([beginning, rest]), taught_from=BEGINNING + 1) for rest in rests]
    for number, row in enumerate(rows):
        row.ids[BEGINNING] = 10 + number  # from here on they differ
    return rows


@given(
    rows=st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=12), min_size=2, max_size=5),
    taught=st.integers(1, 12),
)
def test_what_is_shared_is_alike_in_all_rows_and_nothing_of_it_is_taught(rows: list[list[int]], taught: int) -> None:
    made = [token_row(row, taught) for row in rows]
    count = common_beginning(made)

    assert len({tuple(row[:count]) for row in rows}) == 1
    for row in made:
        assert row.tokens > count
        assert not row.labelled[: count + 1].any()
    grown = {(tuple(row.ids[: count + 1]), row.tokens > count + 1, not row.labelled[: count + 2].any()) for row in made}
    assert len({ids for ids, _, _ in grown}) > 1 or not all(longer and free for _, longer, free in grown)


@given(
    beginning=st.integers(0, 9),
    rests=st.lists(st.integers(1, 9), min_size=1, max_size=5),
)
def test_a_pass_holds_the_beginning_once_and_every_rest_in_full(beginning: int, rests: list[int]) -> None:
    numbers = np.random.default_rng(1)
    start = numbers.integers(0, 100, beginning)
    ids = [np.concatenate([start, numbers.integers(0, 100, rest)]) for rest in rests]
    rows = [token_row(row, taught_from=beginning + 1) for row in ids]

    batch = packed(rows, shared=beginning)

    read, places = batch.inputs["input_ids"][0], batch.inputs["position_ids"][0]
    starts = row_starts(batch.inputs["position_ids"]).tolist()
    assert starts[0] == (beginning if len(rows) > 1 else 0)
    assert starts[-1] == len(read)
    for row, first, end in zip(ids, starts, starts[1:], strict=False):
        whole = torch.cat([read[: starts[0]], read[first:end]])
        assert whole.tolist() == row.tolist()
        assert torch.cat([places[: starts[0]], places[first:end]]).tolist() == list(range(len(row)))
    assert batch.tokens == sum(row.tokens for row in rows)
    assert batch.weight == sum(row.labelled_tokens for row in rows) == int((batch.inputs["labels"] >= 0).sum())


def outcome(network: Any, *, shared: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Losses of the taught tokens in the order of rows, and the gradient of every weight."""
    inputs = packed(rows_alike(), shared=shared).inputs
    starts = row_starts(inputs["position_ids"])
    logits = network(
        input_ids=inputs["input_ids"],
        position_ids=inputs["position_ids"],
        use_cache=False,
        **{row_attention.ROW_STARTS: starts},
    ).logits[0]
    losses_of = torch.nn.functional.cross_entropy(logits[:-1].float(), inputs["labels"][0, 1:], reduction="none")
    losses_of = losses_of[inputs["labels"][0, 1:] >= 0]
    learning = [weight for weight in network.parameters() if weight.requires_grad]
    grads = torch.autograd.grad(losses_of.sum(), learning, allow_unused=True)
    return [grad.float() for grad in grads if grad is not None], losses_of.detach()


@TYPES
@pytest.mark.parametrize("kernels", [False, True, "long"], ids=["torch's operators", "kernels", "products of rows"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen2", "mistral", "olmo2", "smollm3"])
def test_losses_and_gradients_are_those_of_whole_rows(  # noqa: PLR0917 -- pytest
    name: str, kernels: bool | str, dtype: torch.dtype, relative: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = AutoModelForCausalLM.from_pretrained(
        make_family(tmp_path, name), dtype=dtype, attn_implementation=row_attention.register()
    )
    if kernels and not use_kernels(network):
        pytest.skip("no C compiler here")
    monkeypatch.setattr(cpu_attention, "SHORT", 0 if kernels == "long" else 256)

    whole, whole_losses = outcome(network, shared=0)
    ours, our_losses = outcome(network, shared=BEGINNING)

    assert (our_losses - whole_losses).norm() <= relative * whole_losses.norm()
    near(ours, whole, 3 * relative)


@needs_compiler
@TYPES
@pytest.mark.parametrize("shared", [0, 37])
@pytest.mark.parametrize(("heads", "groups", "size"), [(9, 3, 64), (4, 4, 16), (6, 1, 80), (2, 1, 24)])
def test_short_rows_attend_as_their_definition_says(  # noqa: PLR0917 -- pytest
    heads: int, groups: int, size: int, shared: int, dtype: torch.dtype, relative: float
) -> None:
    numbers = torch.Generator().manual_seed(6)
    starts = [shared, shared + 1, shared + 50, shared + 183]
    laid = [torch.randn(1, starts[-1], count, size, generator=numbers).to(dtype) for count in (heads, groups, groups)]
    answer = torch.randn(1, starts[-1], heads, size, generator=numbers).to(dtype)
    outcomes = []
    for exact in (False, True):
        parts = [(part.double() if exact else part).transpose(1, 2).requires_grad_() for part in laid]
        seen = _by_definition(parts, starts) if exact else cpu_attention.ShortRows.apply(*parts, starts, size**-0.5)
        grads = torch.autograd.grad(seen, parts, answer.to(seen.dtype))
        outcomes.append([each.detach().double() for each in (seen, *grads)])

    near(*outcomes, relative)


def _by_definition(parts: list[torch.Tensor], starts: list[int]) -> torch.Tensor:
    query, key, value = parts
    key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for part in (key, value))
    row = torch.bucketize(torch.arange(starts[-1]), torch.tensor(starts), right=True)
    seen = ((row[:, None] == row[None, :]) | (row[None, :] == 0)).tril()
    scores = (query @ key.transpose(2, 3) * query.shape[3] ** -0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@needs_compiler
def test_threads_change_no_bit_of_attention() -> None:
    starts, before = [11, 40, 90, 101], torch.get_num_threads()
    parts = [torch.randn(1, count, 101, 16, requires_grad=True) for count in (4, 2, 2)]
    outcomes = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            seen = cpu_attention.ShortRows.apply(*parts, starts, 0.25)
            outcomes.append((seen.detach(), *torch.autograd.grad(seen.square().sum(), parts)))
    finally:
        torch.set_num_threads(before)

    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


def spec_of(folder: Path, model: Path, **more: Any) -> AttemptSpec:
    return AttemptSpec.model_validate_json(make_spec(folder, model=model, **more).read_bytes())


def loaded(model: Path, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, attn_implementation=row_attention.register(), **more)


def test_rows_share_where_it_is_right_and_worth_it(model: Path, tmp_path: Path) -> None:
    rows, network, places = rows_alike(), loaded(model), list[Path]()

    def shared(rows: list[TokenRow], **more: Any) -> int:
        places.append(tmp_path / str(len(places)))
        return Beginnings(network, spec_of(places[-1], model, **more)).shared_tokens(rows)

    assert shared(rows) == BEGINNING
    assert shared(rows[:1]) == 0
    assert shared([token_row(row.ids[BEGINNING - LEAST + 1 :], LEAST) for row in rows]) == 0  # too few
    assert shared(rows, without=["shared_beginnings"]) == 0
    assert shared(rows, adapter={"method": "lora", "lora_dropout": 0.1}) == 0
    assert shared([*rows, token_row(np.concatenate([rows[0].ids, rows[0].ids.repeat(60)]), BEGINNING + 1)]) == 0


@pytest.mark.parametrize(
    "unfit", [{"attention_dropout": 0.1}, {"attn_implementation": "sdpa"}], ids=["dropout", "another attention"]
)
def test_a_model_that_cannot_shares_nothing(model: Path, tmp_path: Path, unfit: dict[str, Any]) -> None:
    assert longest_sharing(loaded(model)) == row_attention.LONGEST
    layers = loaded(make_family(tmp_path, "mistral", sliding_window=24))
    assert longest_sharing(layers) == 24
    fitting = {"attn_implementation": row_attention.register()} | unfit
    assert longest_sharing(AutoModelForCausalLM.from_pretrained(model, **fitting)) == 0


def test_a_model_that_reads_along_the_sequence_by_other_means_is_seen_in_the_try(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = loaded(model)
    layer = network.model.layers[0].mlp
    plain = type(layer).forward
    assert agrees(network)

    def carrying(self: Any, x: torch.Tensor) -> torch.Tensor:
        carried: torch.Tensor = plain(self, x + x.cumsum(1))
        return carried

    with patch.object(type(layer), "forward", carrying):
        assert not agrees(network)
    assert "gives other numbers" in capsys.readouterr().out


def test_a_pass_that_would_be_masked_wrongly_is_refused(model: Path) -> None:
    inputs = packed(rows_alike(), shared=BEGINNING).inputs
    reads = {name: inputs[name] for name in ("input_ids", "position_ids")}
    starts = {row_attention.ROW_STARTS: row_starts(inputs["position_ids"])}

    with patch.object(row_attention, "LONGEST", 20), pytest.raises(AssertionError, match="attend apart"):
        loaded(model)(**reads, use_cache=False, **starts)


SYSTEM = {"role": "system", "content": "Answer with the colour that is named, and nothing else."}


class Counting:
    """A method that keeps what it has answered."""

    def __init__(self, method: Any) -> None:
        self.answers = list[int]()
        self._method = method

    def __get__(self, instance: Any, _kind: Any) -> Any:
        return self if instance is None else partial(self._answer, instance)

    def _answer(self, instance: Any, rows: Any) -> int:
        self.answers.append(self._method(instance, rows))
        return self.answers[-1]


@pytest.mark.parametrize(
    ("adapter", "dtype", "near_enough"),
    [("qlora", "bfloat16", 0.01), ("lora", "float32", 1e-4), ("full", "float32", 1e-4)],
)
def test_a_run_learns_as_without(model: Path, tmp_path: Path, adapter: str, dtype: str, near_enough: float) -> None:
    rows = [chat(f"{colour} is what it is", colour) for colour in ("red", "green", "blue", "white", "black", "grey")]
    for row in rows:
        row["messages"].insert(0, SYSTEM)
    curves, counted, read = [], [], []
    for left_out in ([], ["shared_beginnings"]):
        place = tmp_path / str(len(curves))
        training = {"num_train_epochs": 2, "learning_rate": 0.001, "dtype": dtype}
        spec = make_spec(
            place, model=model, rows=rows, adapter={"method": adapter}, training=training, without=left_out
        )
        with patch.object(Beginnings, "shared_tokens", Counting(Beginnings.shared_tokens)) as asked:
            code, events = run(spec, place / "out")
        assert code == EXIT_DONE, events[-1]
        curves.append(losses(events))
        counted.append(events[-1].trained_tokens)
        read.append(max(asked.answers))

    assert read[0] > LEAST
    assert read[1] == 0
    assert curves[0] == pytest.approx(curves[1], rel=near_enough)
    assert counted[0] == counted[1]
