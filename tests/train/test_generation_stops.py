"""A tuned model's answer ends at its end of turn, in each family, by the very code that answers in the playground.

The model is the perfect pupil of one row: asked its question, it gives the tokens that the row trains, in order, and
behind the last of them it babbles for ever. It is silenced only by an end that was trained and that ends a generation.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shared.contract.generation import Ended, Question, Sampling
from shared.contract.spec import DataFacts, Training
from shared.errors import Invalid
from tests.train.template_families import FAMILIES_OF_TEMPLATES, family_tokenizer
from tests.train.test_template_families import ROWS, STOPS
from worker.train.answering import ModelRunner
from worker.train.data import RowReader

KINDS = ("one turn", "several", "null content", "reasoning")
MOST = 400  # tokens
# Where a question does not end as the row goes on, by the template: it opens with a thought that the answer does not
# have, or it leaves the thoughts of earlier answers out, which training keeps.
ASKED_OTHERWISE = {
    *((name, kind) for name in ("deepseek_v3", "deepseek_r1", "nemotron_3", "minimax_m2") for kind in KINDS),
    ("qwen3", "several"),
    ("qwen3_5", "several"),
}
# <|end|> closes a channel, not a generation: gpt-oss' generation_config names these.
ENDS = {**STOPS, "gpt_oss": ("<|return|>", "<|call|>")}


class Pupil:
    """A model of one row: `trained` are the tokens that it has learnt to give behind a prompt."""

    def __init__(self, trained: list[int], *, ends: list[int], babble: int) -> None:
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)
        self.generation_config = SimpleNamespace(eos_token_id=ends)
        self.device = torch.device("cpu")
        self.trained, self.babble = trained, babble
        self.prompt: list[int] = []
        self.given: list[int] = []

    def __call__(self, *read: Any, **options: Any) -> Any:
        return self.forward(*read, **options)

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **_: Any) -> Any:
        """Logits of the next token."""
        read = input_ids[0].tolist()
        if past_key_values is None:
            self.prompt, self.given = read, []
        else:
            self.given += read
        knows = self.given == self.trained[: len(self.given)] and len(self.given) < len(self.trained)
        logits = torch.zeros(1, 1, 1000)
        logits[0, 0, self.trained[len(self.given)] if knows else self.babble] = 1.0
        return SimpleNamespace(logits=logits, past_key_values="all that was read")


def last_answer(name: str, kind: str) -> tuple[list[int], list[int]] | None:
    """The tokens of a row before its last trained part, and that part; None for a row that the family refuses."""
    tokenizer = family_tokenizer(name)
    reader = RowReader(
        tokenizer,
        facts=DataFacts(format="chat", train_rows=1),
        training=Training(max_length=100_000, train_on="last_assistant"),
        ends=ENDS.get(name, (tokenizer.eos_token,)),
    )
    (taken,) = reader.take([ROWS[kind]])
    if isinstance(taken, Invalid):
        return None
    row = taken.whole
    first = int(row.labelled.argmax())
    return row.ids[:first].tolist(), row.ids[row.labelled].tolist()


def answered(name: str, kind: str, trained: list[int]) -> tuple[Pupil, str, Ended]:
    """The pupil, asked the row's question: all that it says, and how it ends."""
    tokenizer = family_tokenizer(name)
    stops = ENDS.get(name, (tokenizer.eos_token,))
    (babble,) = tokenizer("z", add_special_tokens=False)["input_ids"]
    pupil = Pupil(trained, ends=tokenizer.convert_tokens_to_ids(list(stops)), babble=babble)
    speaker = ModelRunner(pupil, tokenizer, answer_tokens=MOST, context_tokens=100_000)
    asked = [{**message, "content": message["content"] or ""} for message in ROWS[kind]["messages"][:-1]]
    question = Question(number=1, messages=asked, sampling=Sampling(temperature=0.0, max_tokens=MOST))
    answer, _ = speaker.begin(question)
    pieces: list[Any] = []
    while answer.reason is None:
        pieces += answer.step(speaker.forward)
    return pupil, "".join(piece.text for piece in pieces[:-1]), pieces[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES_OF_TEMPLATES)
def test_an_answer_stops_at_the_end_that_was_trained(name: str, kind: str) -> None:
    row = last_answer(name, kind)
    if row is None:
        assert kind in {"null content", "reasoning"}, "the family refuses such rows, which its own table says"
        return
    before, trained = row
    pupil, text, ended = answered(name, kind, trained)

    assert ended.finish_reason == "stop"
    assert ended.completion_tokens == len(trained)
    assert "zz" not in text
    assert not text.endswith(ENDS.get(name, (family_tokenizer(name).eos_token,)))
    if kind in {"one turn", "several"}:
        assert ("Hello." if kind == "one turn" else "Bye.") in text
        assert (pupil.prompt == before) is ((name, kind) not in ASKED_OTHERWISE)


@pytest.mark.parametrize("name", FAMILIES_OF_TEMPLATES)
def test_an_answer_whose_end_was_not_trained_goes_on(name: str) -> None:
    row = last_answer(name, "one turn")
    assert row is not None
    _, text, ended = answered(name, "one turn", row[1][:-1])

    assert ended.finish_reason == "length"
    assert text.rstrip("z") != text
