"""Answers that pass through the model together and come and leave between tokens: each is what it is alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MambaConfig, MistralConfig

from shared.contract.generation import Question, Sampling
from tests.train.test_batched_answers import TEXTS, resident
from tests.train.test_merging import make_adapter
from tests.train.tiny import make_model_directory, make_tokenizer
from worker.train import joined_answers
from worker.train.answering import Answer, ModelRunner
from worker.train.batched_answers import takes_rows
from worker.train.joined_answers import JoinedAnswers
from worker.train.resident import ResidentModel
from worker.train.tokenizer import load_tokenizer_of

SIZES = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


class Company:
    """A model, and the answers that it gives together."""

    def __init__(self, model: Any, folder: Path, *, together: bool = True) -> None:
        self.speaker = ModelRunner(model, load_tokenizer_of(str(folder)), answer_tokens=40, context_tokens=512)
        self.answers = JoinedAnswers(together=together)
        self.heard: dict[int, list[Any]] = {}
        self.passes: list[int] = []  # rows of each pass
        forward, forward_rows = self.speaker.forward, self.speaker.forward_rows

        def counted(last: list[int], lengths: list[int], cache: Any) -> torch.Tensor:
            self.passes.append(len(last))
            return forward_rows(last, lengths, cache)

        def counted_alone(tokens: list[int], cache: Any) -> Any:
            self.passes.append(1)
            return forward(tokens, cache)

        self.speaker.forward_rows, self.speaker.forward = counted, counted_alone

    def ask(self, number: int, text: str, **sampling: Any) -> Answer:
        settings = Sampling(**({"temperature": 0.0, "max_tokens": 24, "seed": number} | sampling))
        answer, _ = self.speaker.begin(Question(number=number, text=text, sampling=settings))
        self.answers.add(answer)
        self.heard[number] = []
        return answer

    def step(self) -> None:
        for said in self.answers.step(self.speaker):
            self.heard[said.number].append(said)

    def to_the_end(self) -> None:
        while self.answers:
            self.step()

    def text(self, number: int) -> str:
        return "".join(said.text for said in self.heard[number] if said.type == "piece")


def alone(model: Any, folder: Path, text: str, **sampling: Any) -> str:
    company = Company(model, folder)
    company.ask(1, text, **sampling)
    company.to_the_end()
    return company.text(1)


def tiny(folder: Path, family: Any, **own: Any) -> Path:
    tokens = {name: getattr(make_tokenizer(), name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return make_model_directory(
        folder, family(**SIZES, **HEADS, **tokens, **own, initializer_range=0.1, max_position_embeddings=512)
    )


@pytest.mark.parametrize("seed", range(4))
def test_whoever_comes_and_leaves_an_answer_is_the_same(model: Path, seed: int) -> None:
    base, dice = resident(model), random.Random(seed)
    lengths = [dice.randint(1, 30) for _ in TEXTS]
    expected = [alone(base, model, text, max_tokens=length) for text, length in zip(TEXTS, lengths, strict=True)]
    company = Company(base, model)

    for number, (text, length) in enumerate(zip(TEXTS, lengths, strict=True)):
        company.ask(number, text, max_tokens=length)
        for _ in range(dice.randint(0, 4)):
            company.step()
    company.to_the_end()

    assert [company.text(number) for number in range(len(TEXTS))] == expected
    assert max(company.passes) > 3, "they went together"
    assert len(set(expected)) > 4, "the tiny model must say different things"


@pytest.mark.parametrize(
    ("family", "own"),
    [(MistralConfig, {"sliding_window": 16}), (LlamaConfig, {"rope_parameters": {"rope_type": "default"}})],
    ids=["looks back a little", "looks back to the start"],
)
def test_short_and_long_rows_keep_what_they_look_back_to(tmp_path: Path, family: Any, own: dict[str, Any]) -> None:
    folder = tiny(tmp_path / "model", family, **own)
    base = resident(folder)
    texts = ["x" * 40, "no", "seven plus seven", "y" * 15, "z"]
    expected = [alone(base, folder, text) for text in texts]
    company = Company(base, folder)

    for number, text in enumerate(texts):
        company.ask(number, text)
        company.step()
        company.step()
    company.answers.forget(0)  # the widest leaves, and takes its columns along
    company.to_the_end()

    assert [company.text(number) for number in range(1, len(texts))] == expected[1:]
    assert expected[0].startswith(company.text(0))


def test_a_withdrawn_answer_takes_no_further_token_and_its_company_goes_on(model: Path) -> None:
    base = resident(model)
    company = Company(base, model)
    for number in range(3):
        company.ask(number, TEXTS[number])
    for _ in range(5):
        company.step()
    heard = len(company.heard[1])

    company.answers.forget(1)
    company.to_the_end()

    assert len(company.heard[1]) == heard
    assert [company.text(number) for number in (0, 2)] == [alone(base, model, TEXTS[number]) for number in (0, 2)]


def test_adapters_answer_together_as_alone(model: Path, tmp_path: Path) -> None:
    base = resident(model)
    kept = ResidentModel(base, kept=1)
    kept.need("a", make_adapter(model, tmp_path / "adapter", seed=1))

    with kept.speaking("a", 1.0) as tuned:
        expected = [alone(tuned, model, text) for text in TEXTS]
        company = Company(tuned, model)
        for number, text in enumerate(TEXTS):
            company.ask(number, text)
        company.to_the_end()

    assert [company.text(number) for number in range(len(TEXTS))] == expected
    assert expected != [alone(resident(model), model, text) for text in TEXTS]


def test_each_has_its_own_seed_stops_and_penalties(model: Path) -> None:
    base = resident(model)
    settings: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 7},
        {"temperature": 1.0, "seed": 8, "top_p": 0.5},
        {"frequency_penalty": 1.5},
        {"stop": ["e"]},
    ]
    expected = [alone(base, model, "once ", **each) for each in settings]
    company = Company(base, model)

    for number, each in enumerate(settings):
        company.ask(number, "once ", **each)
    company.to_the_end()

    assert [company.text(number) for number in range(len(settings))] == expected


def test_when_memory_runs_out_for_all_each_goes_on_by_itself_and_nothing_is_lost(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = resident(model)
    expected = [alone(base, model, text) for text in TEXTS]
    company = Company(base, model)
    rows = company.speaker.forward_rows

    def short(last: list[int], lengths: list[int], cache: Any) -> torch.Tensor:
        logits = rows(last, lengths, cache)  # the cache has taken it up, as when a late layer fails
        if len(last) > 3 and max(lengths) > 205:
            raise torch.OutOfMemoryError
        return logits

    monkeypatch.setattr(company.speaker, "forward_rows", short)
    for number, text in enumerate(TEXTS):
        company.ask(number, text)
    company.to_the_end()

    assert [company.text(number) for number in range(len(TEXTS))] == expected
    assert all(heard[-1].type == "ended" for heard in company.heard.values())


@pytest.mark.parametrize("work", ["_side_by_side", "_chosen"])
def test_without_memory_to_rearrange_a_cache_each_goes_on_by_itself(
    model: Path, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    base = resident(model)
    expected = [alone(base, model, text) for text in TEXTS]
    company, times = Company(base, model), iter(range(100))
    done = getattr(joined_answers, work)

    def short(*values: Any, **named: Any) -> Any:
        if next(times) == 2:
            raise torch.OutOfMemoryError
        return done(*values, **named)

    monkeypatch.setattr(joined_answers, work, short)
    for number, text in enumerate(TEXTS):
        company.ask(number, text, max_tokens=24)
    company.to_the_end()

    assert [company.text(number) for number in range(len(TEXTS))] == expected
    assert all(heard[-1].type == "ended" for heard in company.heard.values())


def test_one_on_which_the_model_fails_is_declined_and_the_others_are_answered(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = resident(model)
    company = Company(base, model)
    forward = company.speaker.forward

    def failing(tokens: list[int], cache: Any) -> Any:
        if len(tokens) > 190:
            raise RuntimeError("no kernel for this shape")
        return forward(tokens, cache)

    monkeypatch.setattr(company.speaker, "forward", failing)
    for number, text in enumerate(TEXTS):
        company.ask(number, text)
    company.to_the_end()

    ends = [company.heard[number][-1] for number in range(len(TEXTS))]
    declined = [end.number for end in ends if end.type == "declined"]
    assert [TEXTS[number] for number in declined] == ["x" * 200]
    assert "no kernel" in ends[declined[0]].message
    assert sum(end.type == "ended" for end in ends) == len(TEXTS) - 1


def test_a_model_that_carries_state_is_asked_row_by_row(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2, state_size=4)
    folder = make_model_directory(tmp_path / "model", config)
    base = resident(folder)
    assert not takes_rows(base)
    company = Company(base, folder, together=takes_rows(base))

    for number, text in enumerate(TEXTS[:3]):
        company.ask(number, text)
    company.to_the_end()

    assert set(company.passes) == {1}
    assert [company.text(number) for number in range(3)] == [alone(base, folder, text) for text in TEXTS[:3]]


def test_how_likely_tokens_were_is_told_beside_their_text(model: Path) -> None:
    base = resident(model)
    company = Company(base, model)
    company.ask(1, "once ", top_logprobs=3)
    company.ask(2, "a")
    company.to_the_end()

    tokens = [token for said in company.heard[1] if said.type == "piece" for token in said.logprobs or []]
    ended = company.heard[1][-1]
    assert len(tokens) == ended.completion_tokens - (ended.finish_reason == "stop")
    assert company.text(1) == alone(base, model, "once ")
    assert all(len(token.top) == 3 for token in tokens)
    assert all(token.logprob == max(one.logprob for one in token.top) <= 0 for token in tokens), "greedy"
    ids = load_tokenizer_of(str(model))("once ", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        first = torch.log_softmax(base(ids).logits[0, -1].float(), dim=-1).max()
    assert tokens[0].logprob == pytest.approx(float(first), abs=1e-4)
    assert all(said.logprobs is None for said in company.heard[2] if said.type == "piece")
