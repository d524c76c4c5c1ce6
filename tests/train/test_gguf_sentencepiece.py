"""SentencePiece vocabularies of pairs as GGUF: llama.cpp cuts text as the tokenizer does, or they are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import gguf
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from shared.errors import Invalid
from tests.train.test_gguf import SHAPE, TOKENS, make, tuned
from tests.train.test_gguf import _xllamacpp as asked_of_llama_cpp
from tests.train.test_merging import load, make_adapter
from tests.train.tiny import make_model_directory
from worker.train.gguf_sentencepiece import SPACE, adds_space, scores

# In the order of their scores; "le" is joined of two kinds of pairs by way of its longer ones.
PIECES: Final = [
    *(
        SPACE + "p",
        "le",
        SPACE + "ple",
        "as",
        "ase",
        "ease",
        "lease",
        SPACE + "please",
        "us",
        "lus",
        SPACE + "plus",
        "77",
    ),
    *("ll", "hell", "he", "lo", "hello", SPACE + "h", SPACE + "hello"),
]
TEXT: Final = "7 plus 77 please? hello  Spaß — 日本"


def described(pieces: list[str] = PIECES) -> dict[str, Any]:
    """As transformers makes it of a tokenizer.model: each token's pairs, in the order of the tokens."""
    letters = sorted({letter for piece in pieces for letter in piece} | set(" pqrstuvwxyz?abcdefgikmno") - {" "})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    merges = [
        [piece[:place], piece[place:]]
        for piece in pieces
        for place in range(1, len(piece))
        if piece[:place] in vocabulary and piece[place:] in vocabulary
    ]
    made = Tokenizer(models.BPE(vocabulary, [tuple(pair) for pair in merges], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    made.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    document: dict[str, Any] = json.loads(made.to_str())
    return document


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    told = described()
    folder = tmp_path_factory.mktemp("pieces") / "base"
    numbers = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "vocab_size": len(told["model"]["vocab"])}
    make_model_directory(folder, LlamaConfig(**{**SHAPE, **numbers}))
    model = load(folder)
    model.lm_head.weight.data[3:259] = 0.0  # it says no bytes that are no text, which libraries show in different ways
    model.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(told)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = "{% for m in messages %}{{ bos_token }}{{ m.content }}{{ eos_token }}{% endfor %}"
    fast.save_pretrained(folder)
    return folder


def test_tokens_have_the_kinds_and_the_order_that_llama_cpp_joins_them_by(base: Path, tmp_path: Path) -> None:
    made = make(tmp_path, base=base, adapter=make_adapter(base, tmp_path / "a", seed=1), quantization="f16")

    fields = gguf.GGUFReader(made / "model-f16.gguf").fields
    tokens = [
        str(bytes(fields["tokenizer.ggml.tokens"].parts[at]), "utf-8") for at in fields["tokenizer.ggml.tokens"].data
    ]
    kinds = [int(fields["tokenizer.ggml.token_type"].parts[at][0]) for at in fields["tokenizer.ggml.token_type"].data]
    told = [float(fields["tokenizer.ggml.scores"].parts[at][0]) for at in fields["tokenizer.ggml.scores"].data]
    assert kinds[:4] == [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.BYTE]
    assert kinds[tokens.index(SPACE + "please")] == gguf.TokenType.NORMAL
    by_score = sorted(PIECES, key=lambda piece: -told[tokens.index(piece)])
    assert by_score == PIECES
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is True


def test_llama_cpp_gives_the_same_greedy_text_of_the_same_tokens(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    adapter = make_adapter(base, tmp_path / "adapter", seed=1)
    whole = make(tmp_path / "whole", base=base, adapter=adapter, quantization="f32") / "model-f32.gguf"
    words = AutoTokenizer.from_pretrained(base)
    asked = words(TEXT, return_tensors="pt", add_special_tokens=False)
    assert any(token == SPACE + "please" for token in words.convert_ids_to_tokens(asked.input_ids[0]))
    tokens = tuned(base, adapter).generate(**asked, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
    expected = words.decode(tokens[0])[len(words.decode(asked.input_ids[0])) :]

    count, text = asked_of_llama_cpp(whole, text=TEXT)

    assert count == asked.input_ids.shape[1]
    assert text == expected


def test_a_list_without_a_pair_that_llama_cpp_would_join_is_refused() -> None:
    told = described()
    assert list(scores(told)) == PIECES
    told["model"]["merges"].remove(["he", "ll"])

    with pytest.raises(Invalid, match="without the pair") as caught:
        scores(told)
    assert caught.value.code == "tokenizer_not_exported"


@pytest.mark.parametrize(
    ("normalizer", "before", "adds"),
    [
        ([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)], None, True),
        ([normalizers.Replace(" ", SPACE)], None, False),
        ([], {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": False}, True),
        ([], {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": False}, False),
        ([], {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}, None),
        ([normalizers.NFKC(), normalizers.Replace(" ", SPACE)], None, None),
    ],
)
def test_spaces_are_set_as_in_training_or_the_export_is_refused(
    normalizer: list[Any], before: dict[str, Any] | None, adds: bool | None
) -> None:
    told = described()
    made = Tokenizer.from_str(json.dumps(told))
    if normalizer:
        made.normalizer = normalizers.Sequence(normalizer)
        told = json.loads(made.to_str())
    else:
        told["normalizer"], told["pre_tokenizer"] = None, before

    if adds is None:
        with pytest.raises(Invalid) as caught:
            adds_space(told, chats_open_with_control=False)
        assert caught.value.code == "tokenizer_not_exported"
    else:
        assert adds_space(told, chats_open_with_control=False) is adds


def test_a_space_before_the_first_text_alone_is_none_where_chats_open_with_a_control_token() -> None:
    before = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    told = {**described(), "normalizer": None, "pre_tokenizer": before}

    assert adds_space(told, chats_open_with_control=True) is False
