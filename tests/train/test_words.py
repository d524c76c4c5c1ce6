"""Words that are looked up are the words and the tokens of the tokenizer itself."""

from __future__ import annotations

import functools
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from shared.contract.spec import DataFacts, Training
from shared.errors import Invalid
from tests.train.tiny import make_tokenizer
from worker.train import word_cache
from worker.train.data import RowReader, TokenRow
from worker.train.word_cache import token_bytes, words_of

LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|im", "<|pad|>"]
SENTENCES = [
    "The model can't read 1234 lines;  it's\n\n  'They'll' say: naïve 🙂 – “so” 中文字",
    "a  b   c\t\r\n d1 22 333",
]
PIECES = [
    *SPECIAL,
    *(
        "the",
        " ",
        "  ",
        "\n",
        "\r\n ",
        "'S",
        "'s",
        "'ſ",
        "12",
        "345",
        " 6",
        "!?",
        " «",
        "é",
        "e\u0301",
        "🙂",
        "𝟙",
        "字",
    ),
    *("\u2028", "\x1c", "\u0378", "\x85", "\u180e", "ǅ", "٣", "½"),
]


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def by_bytes(*, by_words: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_words)


CUTTERS = {
    "gpt2": by_bytes(by_words=True),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_bytes(by_words=True)]),
    "llama": pre_tokenizers.Sequence([split(LLAMA), by_bytes(by_words=False)]),
    "qwen": pre_tokenizers.Sequence([split(LLAMA.replace("{1,3}", "")), by_bytes(by_words=False)]),
}


@functools.cache
def trained(cutter: str, *, composes: bool = False) -> Tokenizer:
    """A tokenizer with merges that show where words were cut."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = CUTTERS[cutter]
    backend.decoder = decoders.ByteLevel()
    if composes:
        backend.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    dice = random.Random(1)
    texts = ["".join(dice.choices(PIECES[len(SPECIAL) :], k=40)) for _ in range(60)]
    backend.train_from_iterator([*SENTENCES, *texts], trainer)
    return backend


def looked_up(backend: Tokenizer) -> word_cache.WordTokens:
    known = token_bytes(backend)
    assert known is not None
    found = words_of(backend, known)
    assert found is not None
    return found


@pytest.mark.parametrize("cutter", CUTTERS)
def test_every_settled_character_is_cut_as_the_tokenizer_cuts_it(cutter: str) -> None:
    found = looked_up(trained(cutter))
    settled = [one for one in map(chr, range(0x1FB00)) if word_cache._SETTLED.fullmatch(one)]
    assert len(settled) > 50_000

    for some in batches(settled, 4096):
        text = "".join(f"a{one}1 {one}  {one}'" for one in some)
        theirs = [span for _, span in CUTTERS[cutter].pre_tokenize_str(text)]
        ends = list(itertools.accumulate(map(len, found._cut(text))))
        assert [end for _, end in theirs] == ends


def batches(items: list[str], size: int) -> list[list[str]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


@pytest.mark.parametrize("composes", [False, True])
@pytest.mark.parametrize("cutter", CUTTERS)
def test_looked_up_tokens_are_the_tokenizers(cutter: str, composes: bool) -> None:
    backend = trained(cutter, composes=composes)
    found, answered = looked_up(backend), 0

    @given(st.lists(st.sampled_from(PIECES), max_size=40))
    def compare(pieces: list[str]) -> None:
        nonlocal answered
        text = "".join(pieces)
        ids = found.ids(text)
        if ids is not None:
            answered += 1
            assert ids.tolist() == backend.encode(text, add_special_tokens=False).ids

    compare()
    assert answered > 10
    for text in SENTENCES:
        assert found.ids(text).tolist() == backend.encode(text, add_special_tokens=False).ids


def changed(**parts: Any) -> Tokenizer:
    backend = Tokenizer.from_str(trained("gpt2").to_str())
    for part, value in parts.items():
        setattr(backend, part, value)
    return backend


def with_token(token: AddedToken) -> Tokenizer:
    backend = changed()
    backend.add_tokens([token])
    return backend


@pytest.mark.parametrize(
    "backend",
    [
        changed(normalizer=normalizers.Lowercase()),
        changed(normalizer=normalizers.Sequence([normalizers.NFC()])),
        changed(pre_tokenizer=None),
        changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        changed(pre_tokenizer=split(LLAMA)),
        changed(pre_tokenizer=pre_tokenizers.Sequence([split(r"\d"), by_bytes(by_words=False)])),
        changed(encode_special_tokens=True),
        changed(model=models.BPE(vocab={"a": 0}, merges=[], dropout=0.5)),
        with_token(AddedToken("<mask>", lstrip=True)),
        with_token(AddedToken("<word>", single_word=True)),
        with_token(AddedToken("<normal>", normalized=True)),  # beside others that are found before it
    ],
)
def test_a_tokenizer_with_other_parts_is_asked_itself(backend: Tokenizer) -> None:
    assert words_of(backend, token_bytes(backend) or []) is None


def test_texts_that_hardly_repeat_their_words_are_left_to_the_tokenizer() -> None:
    found = looked_up(trained("gpt2"))
    numbers = [" ".join(str(1000 * row + one) for one in range(100)) for row in range(1000)]

    answers = [found.ids(text) is not None for text in numbers]

    assert answers[0]
    assert not answers[-1]
    assert sum(answers) * 100 <= word_cache.TRIED + 200


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "REMEMBERED", 5)
    found = looked_up(trained("gpt2"))
    text = " ".join(f"{word} {'x' * 100}" for word in "abcdefgh")

    assert found.ids(text).tolist() == trained("gpt2").encode(text).ids
    assert len(found._known) == 5
    assert max(map(len, found._known)) <= word_cache.LONGEST_REMEMBERED


@pytest.mark.parametrize("train_on", ["assistant", "last_assistant", "all"])
def test_rows_read_by_memory_are_those_that_the_tokenizer_reads(train_on: str, tmp_path: Path) -> None:
    dice, made = random.Random(3), []
    for _ in range(40):
        turns = [{"role": "system", "content": dice.choice(SENTENCES)}] if dice.random() < 0.5 else []
        for role in ("user", "assistant") * dice.randint(1, 3):
            weight = {"weight": dice.randint(0, 1)} if role == "assistant" else {}
            turns.append({"role": role, "content": "".join(dice.choices(PIECES, k=dice.randint(0, 30))), **weight})
        made.append({"messages": turns})

    def rows(*, by_memory: bool) -> list[tuple[list[int], list[bool]]]:
        tokenizer = make_tokenizer()
        reader = RowReader(
            tokenizer,
            facts=DataFacts(format="chat", train_rows=40),
            training=Training(train_on=train_on, max_length=99),
        )
        assert reader._alignment._words is not None
        if not by_memory:
            reader._alignment._words = None
        written = [one for one in reader.take(made) if not isinstance(one, Invalid)]  # some answers are empty
        assert len(written) > 20
        taken = [row for one in written for row in (one.whole, one.kept)]
        return [(row.ids.tolist(), row.labelled.tolist()) for row in taken if isinstance(row, TokenRow)]

    assert rows(by_memory=True) == rows(by_memory=False)
