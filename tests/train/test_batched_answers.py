"""Answers that pass through the model together: each is what it would be alone, and what `generate` says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, MistralConfig, Qwen2Config

from shared.contract.generation import PlaygroundSpec, Question, Sampling
from tests.train.test_merging import make_adapter
from tests.train.tiny import make_model_directory, make_tokenizer
from worker.train import batched_answers
from worker.train.answering import Answer, ModelRunner
from worker.train.batched_answers import Batcher
from worker.train.resident import ResidentModel, load_resident
from worker.train.tokenizer import load_tokenizer_of

TEXTS = ["once ", "a", "what is this? " * 9, "Grüße 🙂", "x" * 200, "no", "seven plus seven", "{}"]


def resident(folder: Path, **values: Any) -> Any:
    spec = {"base_model_path": str(folder), "dtype": "float32", "quantization": None, "channel": 0} | values
    return load_resident(PlaygroundSpec(**spec))


class Answering:
    """A model with what is asked of it."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.model, self.tokenizer = model, load_tokenizer_of(str(folder))
        self.speaker = ModelRunner(model, self.tokenizer, answer_tokens=24, context_tokens=512)

    def begun(self, text: str, number: int = 0, **sampling: Any) -> Answer:
        settings = Sampling(**({"temperature": 0.0, "max_tokens": 24, "seed": number} | sampling))
        return self.speaker.begin(Question(number=number, text=text, sampling=settings))[0]

    def said(self, answers: list[Answer], *, at_once: int, model: Any = None) -> list[tuple[str, str | None, int]]:
        batcher = Batcher(self.model, pad_id=self.tokenizer.pad_token_id, at_once=at_once)
        over = {answer.number: answer for answer in batcher.answer(model or self.model, answers)}
        assert len(over) == len(answers)
        return [(over[each.number].text, over[each.number].reason, over[each.number].tokens) for each in answers]

    def all_said(self, *, at_once: int, model: Any = None, **sampling: Any) -> list[tuple[str, str | None, int]]:
        asked = [self.begun(text, number, **sampling) for number, text in enumerate(TEXTS)]
        return self.said(asked, at_once=at_once, model=model)


@pytest.fixture(scope="module")
def asked(model: Path) -> Answering:
    return Answering(resident(model), model)


@torch.no_grad()
def test_a_greedy_batch_says_what_upstreams_generate_says_of_the_same_batch(asked: Answering) -> None:
    tokenizer = asked.tokenizer
    tokenizer.padding_side = "left"
    rows = tokenizer(TEXTS, return_tensors="pt", padding=True)
    written = asked.model.generate(**rows, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    upstream = [tokenizer.decode(row[rows["input_ids"].shape[1] :], skip_special_tokens=True) for row in written]

    assert [text for text, _, _ in asked.all_said(at_once=8)] == upstream


@pytest.mark.parametrize("at_once", [2, 3, 8])
def test_an_answer_is_the_same_alone_and_in_whatever_company(asked: Answering, at_once: int) -> None:
    alone = [asked.said([asked.begun(text)], at_once=1)[0] for text in TEXTS]

    assert asked.all_said(at_once=at_once) == alone
    assert len({text for text, _, _ in alone}) > 4, "the tiny model must say different things"


@pytest.mark.parametrize(("family", "own"), [(MistralConfig, {"sliding_window": 16}), (Qwen2Config, {})])
def test_other_families_say_in_company_what_they_say_alone(tmp_path: Path, family: Any, own: dict[str, Any]) -> None:
    tokens = {name: getattr(make_tokenizer(), name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = family(**sizes, **heads, **tokens, **own, initializer_range=0.1, max_position_embeddings=512)
    folder = make_model_directory(tmp_path / "model", config)
    member = Answering(resident(folder), folder)

    assert member.all_said(at_once=8) == member.all_said(at_once=1)


def test_a_model_that_carries_state_is_asked_one_row_at_a_time(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = AutoModelForCausalLM.from_config(config).eval()

    assert Batcher(model, pad_id=2, at_once=8).at_once == 1


def test_adapters_answer_in_company_as_alone(asked: Answering, model: Path, tmp_path: Path) -> None:
    own = Answering(resident(model), model)
    kept = ResidentModel(own.model, kept=1)
    kept.need("a", make_adapter(model, tmp_path / "adapter", seed=1))

    with kept.speaking("a", 1.0) as tuned:
        together, alone = own.all_said(at_once=8, model=tuned), own.all_said(at_once=1, model=tuned)

    assert together == alone != asked.all_said(at_once=8)


def test_each_answer_has_its_own_length_and_its_own_stops(asked: Answering) -> None:
    whole, _, _ = asked.said([asked.begun("once ")], at_once=1)[0]
    stop = whole[3:5]
    mixed = [
        asked.begun("once ", 0, stop=[stop]),
        asked.begun("once ", 1, max_tokens=5),
        asked.begun("x" * 200, 2),
        asked.begun("once ", 3, temperature=1.0),
    ]

    cut, short, long, drawn = asked.said(mixed, at_once=4)

    assert cut[:2] == (whole[: whole.index(stop)], "stop")
    assert (short[1], short[2]) == ("length", 5)
    assert whole.startswith(short[0])
    assert long == asked.said([asked.begun("x" * 200)], at_once=1)[0]
    assert drawn == asked.said([asked.begun("once ", 3, temperature=1.0)], at_once=1)[0]


def test_when_memory_runs_out_half_as_many_rows_go_on_and_nothing_is_lost(
    asked: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    step = batched_answers.Batch.step

    def short_of_memory(batch: Any, model: Any) -> Any:
        rows = len(batch._rows)
        sizes.append(rows)
        if rows > 2 and batch._mask.shape[1] > 204:  # in the middle of a batch
            raise torch.OutOfMemoryError
        return step(batch, model)

    expected = asked.all_said(at_once=1)
    monkeypatch.setattr(batched_answers.Batch, "step", short_of_memory)

    assert asked.all_said(at_once=8) == expected
    assert sizes[0] == 8
    assert sizes[-1] <= 2


def test_a_batch_is_as_large_as_free_memory_takes_caches_for(asked: Answering, monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = Batcher(asked.model, pad_id=2, at_once=8)
    waiting = [asked.begun("x" * 200, number) for number in range(8)]
    row = batcher._row_bytes * (200 + 24)
    assert batcher._row_bytes == 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, size, float32

    monkeypatch.setattr(batched_answers, "_free_bytes", lambda _: int(3.5 * row / batched_answers.CACHE_SHARE))

    assert batcher._size(asked.model, waiting) == 3
