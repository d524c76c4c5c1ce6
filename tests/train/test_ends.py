"""Where a row begins and ends: one begin token, and the trained part ends with one end of turn."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, ByT5Tokenizer

from shared.contract.spec import AttemptSpec, DataFacts, Training
from shared.errors import Invalid
from tests.train.template_families import family_tokenizer
from tests.train.tiny import CHATML, kto_rows, make_spec, make_tokenizer, preference_rows, write_rows
from worker.train.data import RowReader
from worker.train.tokenizer import generation_ends, load_tokenizer

# A last end token stands behind the whole conversation, as in the templates of several families.
ENDED_TWICE = CHATML + "{% if not add_generation_prompt %}{{ '<|end|>' }}{% endif %}"
WITHOUT_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
BEGIN, END = 0, 1


def read(folder: Path, rows: list[dict], *, data_format: str, tokenizer: Any) -> list[Any]:
    facts = DataFacts(format=data_format, train_rows=len(rows))
    parses = data_format in ("text", "prompt_completion")
    reader = RowReader(tokenizer, facts=facts, training=Training(special_tokens="parse" if parses else "text"))
    return reader.read(write_rows(folder / "rows.jsonl", rows)).rows


def adding(before: str, behind: str = "") -> Any:
    """A tokenizer that writes tokens around each text by itself."""
    tokenizer = make_tokenizer()
    tokens = [(one, tokenizer.convert_tokens_to_ids(one)) for one in (before, behind) if one]
    single = " ".join(filter(None, (before, "$A", behind)))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=tokens)
    return tokenizer


def ids_of(text: str) -> list[int]:
    return make_tokenizer().backend_tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("template", [CHATML, ENDED_TWICE])
def test_each_answer_of_a_preference_row_ends_with_its_end_of_turn(tmp_path: Path, template: str) -> None:
    rows = read(tmp_path, preference_rows(1), data_format="preference", tokenizer=make_tokenizer(template))

    assert rows[0].answers == [[*ids_of("good"), END], [*ids_of("bad one"), END]]


@pytest.mark.parametrize("template", [CHATML, ENDED_TWICE])
def test_a_kto_answer_ends_with_its_end_of_turn(tmp_path: Path, template: str) -> None:
    rows = read(tmp_path, kto_rows(2)[1:], data_format="kto", tokenizer=make_tokenizer(template))

    assert rows[0].answers == [[*ids_of("good"), END]]


def test_an_answer_without_an_end_in_its_template_gets_the_end_token(tmp_path: Path) -> None:
    rows = read(tmp_path, preference_rows(1), data_format="preference", tokenizer=make_tokenizer(WITHOUT_END))

    assert rows[0].answers == [[*ids_of("good"), END], [*ids_of("bad one"), END]]


@pytest.mark.parametrize("text", ["hi", "<|im_start|>hi"])
def test_a_text_has_one_begin_token(tmp_path: Path, text: str) -> None:
    (row,) = read(tmp_path, [{"text": text}], data_format="text", tokenizer=adding("<|im_start|>"))

    assert row.ids.tolist() == [BEGIN, *ids_of("hi"), END]
    assert row.labelled.tolist() == [False, True, True, True]


@pytest.mark.parametrize("prompt", ["q", "<|im_start|>q"])
def test_a_prompt_has_one_begin_token(tmp_path: Path, prompt: str) -> None:
    rows = [{"prompt": prompt, "completion": "hi"}]
    (row,) = read(tmp_path, rows, data_format="prompt_completion", tokenizer=adding("<|im_start|>"))

    assert row.ids.tolist() == [BEGIN, *ids_of("qhi"), END]
    assert row.labelled.tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("ending", ["", "<|im_end|>"])
def test_an_end_token_that_the_tokenizer_adds_is_trained_and_stands_once(tmp_path: Path, ending: str) -> None:
    rows = [{"prompt": "q", "completion": "hi" + ending}]
    tokenizer = adding("<|im_start|>", "<|im_end|>")
    (row,) = read(tmp_path, rows, data_format="prompt_completion", tokenizer=tokenizer)

    assert row.ids.tolist() == [BEGIN, *ids_of("qhi"), END]
    assert row.labelled.tolist() == [False, False, True, True, True]


UNENDED = (
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def folder_with(folder: Path, **generation: Any) -> Path:
    """A base's folder whose template writes no end of turn: each turn opens with a token."""
    tokenizer = make_tokenizer(UNENDED)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": [1, 2]}), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return folder


def test_what_ends_a_turn_is_read_from_the_generation_config_where_no_template_tells(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "base", eos_token_id=[1, make_tokenizer().vocab_size])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = generation_ends(tokenizer, folder)
    turns = [("user", "q"), ("assistant", "one"), ("user", "r"), ("assistant", "two")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}

    def trained(*stops: str) -> str:
        facts = DataFacts(format="chat", train_rows=1)
        (taken,) = RowReader(tokenizer, facts=facts, training=Training(), ends=stops).take([record])
        return str(tokenizer.decode(taken.whole.ids[taken.whole.labelled]))

    assert ends == ("<|im_end|>", "<|pad|>", "<|user|>")
    assert trained(*ends) == "one<|user|>two<|im_end|>"
    assert trained("<|im_end|>") == "onetwo<|im_end|>"


def test_a_tokenizer_that_does_not_tell_its_tokens_characters_is_refused_by_name(tmp_path: Path, model: Path) -> None:
    spec = AttemptSpec.model_validate_json(make_spec(tmp_path, model=model).read_bytes())
    folder = tmp_path / "slow"
    ByT5Tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "t5"}', encoding="utf-8")

    with pytest.raises(Invalid) as refused:
        load_tokenizer(spec.model_copy(update={"base_model_path": str(folder)}))

    assert refused.value.code == "no_fast_tokenizer"


def test_ids_of_calls_have_nine_characters_where_the_template_takes_no_others() -> None:
    call = {"id": "call_abcdefghijkl", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    kept = {**call, "id": "Abc123xyz"}
    messages = [
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "", "tool_calls": [call, kept]},
        *({"role": "tool", "tool_call_id": one["id"], "content": "r"} for one in (call, kept)),
        {"role": "assistant", "content": "Hello."},
    ]

    def taken(name: str) -> Any:
        reader = RowReader(
            family_tokenizer(name), facts=DataFacts(format="chat", train_rows=1), training=Training(max_length=9999)
        )
        (row,) = reader.take([{"messages": messages}])
        assert not isinstance(row, Invalid), row.message
        return family_tokenizer(name).decode(row.whole.ids), [one.code for one in row.lost]

    text, codes = taken("mistral_v3")
    call_id, other = re.findall(r'"id": "(\w+)"', text)
    assert (len(call_id), other, codes) == (9, "Abc123xyz", ["call_ids_mapped"])
    assert re.findall(r'"call_id": "(\w+)"', text) == [call_id, other]
    assert taken("qwen3")[1] == []


def kimi_calls(family: str, *ids: str, codes: list[str]) -> tuple[list[str], list[str]]:
    """What a template of Kimi K2 writes as ids of calls, two answers of them, and as ids of their results."""
    first, second, third = (
        {"id": one, "type": "function", "function": {"name": "f", "arguments": "{}"}} for one in ids
    )
    results = ({"role": "tool", "tool_call_id": one, "content": "r"} for one in ids)
    messages = [
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "", "tool_calls": [first, second]},
        *(next(results), next(results)),
        {"role": "assistant", "content": "", "tool_calls": [third]},
        next(results),
        {"role": "assistant", "content": "Hello."},
    ]
    tokenizer = family_tokenizer(family)
    reader = RowReader(tokenizer, facts=DataFacts(format="chat", train_rows=1), training=Training(max_length=9999))
    (row,) = reader.take([{"messages": messages}])
    assert not isinstance(row, Invalid), row.message
    assert [one.code for one in row.lost] == codes
    text = tokenizer.decode(row.whole.ids)
    return re.findall(r"call_begin\|>(.*?)<\|tool_call_arg", text), re.findall(r"Return of (.*)\n", text)


def test_ids_that_stand_for_a_calls_name_are_made_of_the_name_and_counted_through_the_conversation() -> None:
    named = ["functions.f:0", "functions.f:1", "functions.f:2"]
    mapped = ["call_ids_mapped"]

    assert kimi_calls("kimi_k2", "call_a", "call_b", "call_c", codes=mapped) == (named, named)
    assert kimi_calls("kimi_k2", "call_a", "call_b", "call_a", codes=mapped) == (named, named)  # an id used again
    assert kimi_calls("kimi_k2", *named, codes=[]) == (named, named)
    own = [f"functions.f:{number}" for number in (7, 8, 9)]  # a part of a longer conversation
    assert kimi_calls("kimi_k2", *own, codes=[]) == (own, own)


def test_results_have_the_ids_that_a_template_makes_of_their_calls() -> None:
    named = ["functions.f:0", "functions.f:1", "functions.f:0"]

    assert kimi_calls("kimi_k2_first", "a", "b", "c", codes=["call_ids_mapped"]) == (named, named)


def test_the_ids_of_a_pairs_answers_go_on_from_those_before_them() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    asked = [
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "r"},
    ]
    other = {**call, "id": "b", "function": {"name": "g", "arguments": "{}"}}
    answers = [{"role": "assistant", "content": "", "tool_calls": [one]} for one in (call, other)]
    tokenizer = family_tokenizer("kimi_k2")
    facts = DataFacts(format="preference", train_rows=1)
    reader = RowReader(tokenizer, facts=facts, training=Training(max_length=9999))
    (row,) = reader.take([{"messages": asked, "chosen": answers[0], "rejected": answers[1]}])

    assert not isinstance(row, Invalid), row.message
    whole: Any = row.whole
    assert ["functions.f:1" in tokenizer.decode(ids) for ids in whole.answers] == [True, False]
    assert "functions.g:1" in tokenizer.decode(whole.answers[1])


def test_a_sentencepiece_model_alone_is_refused_with_the_way_to_convert_it(tmp_path: Path, model: Path) -> None:
    spec = AttemptSpec.model_validate_json(make_spec(tmp_path, model=model).read_bytes())
    folder = tmp_path / "slow"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\0\0\0\0\x18\x02")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}', encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")

    with pytest.raises(Invalid, match=r"\(tokenizer\.model\).*save_pretrained") as refused:
        load_tokenizer(spec.model_copy(update={"base_model_path": str(folder)}))

    assert refused.value.code == "no_fast_tokenizer"


def test_a_tokenizer_of_words_and_merges_is_served_as_one_with_a_tokenizer_json(tmp_path: Path, model: Path) -> None:
    spec = AttemptSpec.model_validate_json(make_spec(tmp_path, model=model).read_bytes())
    folder = tmp_path / "words"
    folder.mkdir()
    words = [*map(chr, range(33, 127)), "\u0120", "\u010a", "he", "hel", "<|end|>"]
    (folder / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nh e\nhe l\n", encoding="utf-8")
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")

    tokenizer = load_tokenizer(spec.model_copy(update={"base_model_path": str(folder)}))
    rows = [{"prompt": "say ", "completion": "hello"}]
    (row,) = read(tmp_path, rows, data_format="prompt_completion", tokenizer=tokenizer)

    assert tokenizer.convert_ids_to_tokens(row.ids[row.labelled]) == ["hel", "l", "o", "<|end|>"]
