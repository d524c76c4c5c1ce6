"""A tokenizer as metadata of a GGUF file: tokens, their kinds, merges, special tokens, chat template.

llama.cpp has its own code for each way in which text is cut before its bytes are paired, and goes by a name
(`tokenizer.ggml.pre`). The names here are read from the tokenizer itself: its pre-tokenizer must be, to the letter, the
one that llama.cpp's `llama-vocab.cpp` writes out under that name. What has no name there is refused.
"""

from __future__ import annotations

import json
from typing import Any, Final

import gguf

from shared.errors import Invalid
from worker.train import gguf_sentencepiece
from worker.train.chat import ChatTemplate
from worker.train.gguf_sentencepiece import refused
from worker.train.turns import ASKED

_WORDS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPLITS: Final = {
    _WORDS + r"|\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"|\p{N}" + _REST: "qwen2",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
# GPT-2's own expression is what tokenizers' ByteLevel cuts by, unless its settings say otherwise.
_BYTES_OF_WORDS: Final = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES: Final = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_DIGITS: Final = {"type": "Digits", "individual_digits": True}


def write_tokens(writer: gguf.GGUFWriter, tokenizer: Any, *, rows: int) -> None:
    """Add the tokenizer. `rows`: of the embedding matrix; it may have more than there are tokens.

    Raises:
        Invalid: `tokenizer_not_exported`, llama.cpp has no such tokenizer, or it is not known to have one.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    if gguf_sentencepiece.is_sentencepiece(described):
        _write_pieces(writer, tokenizer, described, rows=rows)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(described))
        tokens, kinds = _tokens(tokenizer, rows=rows)
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges(_merges(described["model"]["merges"]))
    _write_special(writer, tokenizer)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _write_pieces(writer: gguf.GGUFWriter, tokenizer: Any, described: dict[str, Any], *, rows: int) -> None:
    tokens, kinds = _tokens(tokenizer, rows=rows)
    unknown = described["model"].get("unk_token")
    normal = gguf.TokenType.NORMAL
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    opens = _chats_open_with_control(tokenizer)
    gguf_sentencepiece.write_scores(writer, tokens, described, chats_open_with_control=opens)
    writer.add_token_types(
        [
            gguf_sentencepiece.kind_of(token, unknown=unknown) if kind is normal or token == unknown else kind
            for token, kind in zip(tokens, kinds, strict=True)
        ]
    )


def _chats_open_with_control(tokenizer: Any) -> bool:
    if not isinstance(tokenizer.chat_template, str):
        return False
    try:
        text = ChatTemplate(tokenizer).render([dict(ASKED)], tools=None, prompt_only=True)
    except Invalid:
        return False
    return text.startswith(tuple(tokenizer.all_special_tokens))


def pre_tokenizer(described: dict[str, Any]) -> str:
    """llama.cpp's name for how this tokenizer.json cuts text. Raises Invalid."""
    model, normalizer = described["model"], described.get("normalizer")
    steps = _steps(described.get("pre_tokenizer"))
    name: str | None = None
    match steps:
        case [{"type": "Split", "pattern": {"Regex": str(expression)}, "behavior": "Isolated", "invert": False}, last]:
            name = _SPLITS.get(expression) if _is(last, _BYTES) else None
        case [digits, last] if _is(digits, _DIGITS) and _is(last, _BYTES_OF_WORDS):
            name = "smollm"
        case [only] if _is(only, _BYTES_OF_WORDS):
            name = "gpt-2"
    # llama.cpp knows no normal form; for Qwen's text it does without, and so do the files that Qwen publishes.
    plain = normalizer is None or (name == "qwen2" and normalizer == {"type": "NFC"})
    paired = model.get("type") == "BPE" and not model.get("byte_fallback") and model.get("merges")
    if name is None or not plain or not paired:
        raise refused(f"{model.get('type')}, {' + '.join(step['type'] for step in steps) or 'no pre-tokenizer'}")
    return name


def _steps(pre: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre is None:
        return []
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    return list(steps)


def _is(step: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(step.get(name) == value for name, value in wanted.items())


def _tokens(tokenizer: Any, *, rows: int) -> tuple[list[str], list[int]]:
    """Text and kind of every row of the embedding."""
    by_number = {number: text for text, number in tokenizer.get_vocab().items()}
    if max(by_number) >= rows:
        raise Invalid(
            f"The tokenizer has token {max(by_number)}, the model rows for {rows} tokens only.",
            code="tokenizer_not_exported",
            param="adapter",
        )
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for number in range(rows):
        text = by_number.get(number)
        if text is None:
            tokens.append(f"[PAD{number}]")
            kinds.append(gguf.TokenType.UNUSED)
            continue
        tokens.append(text)
        if number not in added:
            kinds.append(gguf.TokenType.NORMAL)
        else:
            # Some models call a token ordinary that only their template writes.
            special = added[number].special or (text.startswith("<|") and text.endswith("|>"))
            kinds.append(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
    return tokens, kinds


def _merges(merges: list[Any]) -> list[str]:
    """`a b` each. Pairs are a list of two since tokenizers 0.20, where a space inside of one is possible."""
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]
    return [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in pairs]


def _write_special(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    numbers = {
        writer.add_bos_token_id: tokenizer.bos_token_id,
        writer.add_eos_token_id: tokenizer.eos_token_id,
        writer.add_unk_token_id: tokenizer.unk_token_id,
        writer.add_pad_token_id: tokenizer.pad_token_id,
    }
    for add, number in numbers.items():
        if number is not None:
            add(number)
    # Said in any case: llama.cpp has defaults of its own for each name.
    around = tokenizer("a").input_ids
    writer.add_add_bos_token(len(around) > 1 and around[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(around) > 1 and around[-1] == tokenizer.eos_token_id)
