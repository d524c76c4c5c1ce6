"""Cases that users of other tools reported, each with its right value: one test a case, by the case's name.

Rows go the way of an upload: the file check, the canonical rows, the trainer's reader; where a preflight is to tell
of a fault, also through the preflight. `docs/data-formats.md` lists them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pytest

from shared.contract.events import EXIT_DONE, TokenReport
from shared.contract.spec import Adapter, AttemptSpec, DataFacts, JobSpec, PreflightSpec, Training
from shared.errors import Invalid, NotYet
from shared.rows.check import DatasetReport, check
from shared.rows.convert import checked_lines
from shared.settings import Settings
from shared.settle.catalogue import SMOLLM2, load_catalogue
from shared.settle.device_fit import Candidate, fits
from shared.settle.model_facts import facts_of
from shared.settle.sizing import Workload, estimate
from tests.factories import make_spec as settled_spec
from tests.train.families import make_family
from tests.train.template_families import family_tokenizer
from tests.train.test_control_text import tokenizer_of
from tests.train.tiny import CHATML, chat, chat_rows, losses, make_spec, make_tokenizer, run, write_rows
from worker.train.data import RowReader
from worker.train.preflight import examine

Row = dict[str, Any]
USER: Final = {"role": "user", "content": "Which gate?"}
ANSWER: Final = {"role": "assistant", "content": "Gate 4."}
TOOL: Final = {
    "type": "function",
    "function": {"name": "gate", "parameters": {"type": "object", "properties": {"flight": {"type": "string"}}}},
}
ARGUMENTS: Final = '{"flight": "LX 12"}'


class Reading(NamedTuple):
    """What a file's check reports, and what the trainer makes of each row."""

    report: DatasetReport
    texts: list[str]  # each row, whole
    trained: list[list[str]]  # the trained parts of each row


def uploaded(rows: Sequence[Row]) -> tuple[DatasetReport, list[Row]]:
    """The check's report of a file and its canonical rows."""
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    report = check([data])
    return report, [json.loads(line) for line in checked_lines([data])] if report.ok else []


def reader(tokenizer: Any, report: DatasetReport, **training: Any) -> RowReader:
    facts = DataFacts(format=report.format, train_rows=report.rows)
    return RowReader(tokenizer, facts=facts, training=Training.model_validate({"max_length": 10_000, **training}))


def read(tokenizer: Any, *rows: Row, **training: Any) -> Reading:
    """Rows as they are uploaded, read as a job reads them; none is refused."""
    report, canonical = uploaded(rows)
    assert report.ok, report.problems
    texts, trained = [], []
    for taken in reader(tokenizer, report, **training).take(canonical):
        assert not isinstance(taken, Invalid), taken.message
        row: Any = taken.whole
        edges = np.flatnonzero(np.diff(row.labelled.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
        texts.append(tokenizer.decode(row.ids))
        trained.append([tokenizer.decode(row.ids[start:end]) for start, end in edges])
    return Reading(report, texts, trained)


def refusal(folder: Path, tokenizer: Any, *rows: Row, **training: Any) -> Invalid:
    """Why a trainer refuses rows that their file's check accepts."""
    report, canonical = uploaded(rows)
    assert report.ok, report.problems
    with pytest.raises(Invalid) as refused:
        reader(tokenizer, report, **training).read(write_rows(folder / "refused.jsonl", canonical))
    return refused.value


def refused_by_the_check(row: Row, *, before: Row) -> tuple[str, str, int, str]:
    """Field, code and line of the only problem that `row` has in a file whose first line is `before`; its words."""
    report, _ = uploaded([before, row])
    (problem,) = report.problems
    return problem.param, problem.code, problem.line, problem.message


def examined(folder: Path, model: Path, *rows: Row, tokenizer: Any) -> TokenReport:
    """The preflight of rows on a base with this tokenizer."""
    report, canonical = uploaded(rows)
    assert report.ok, report.problems
    base = folder / "base"
    base.mkdir()
    shutil.copy(model / "config.json", base)
    tokenizer.save_pretrained(base)
    attempt = AttemptSpec.model_validate_json(make_spec(folder, model=base, rows=canonical).read_bytes())
    kept = {key: getattr(attempt, key) for key in ("job", "base_model_path", "train_file")}
    return examine(PreflightSpec(**kept, preview_rows=[1], memory_bytes=1 << 30))


def calling(arguments: str = ARGUMENTS, **keys: Any) -> Row:
    call = {"id": "call_1", "type": "function", "function": {"name": "gate", "arguments": arguments}}
    called = {"role": "assistant", "content": None, "tool_calls": [call], **keys}
    return {"messages": [USER, called], "tools": [TOOL]}


# As DeepSeek V3's template, which joins a call's name and arguments as texts.
JOINS_TEXTS: Final = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}"
    "{% elif m['role'] == 'tool' %}{{ '<|tool|>' + m['content'] }}{% elif 'tool_calls' in m %}{{ '<|assistant|>' }}"
    "{% for c in m['tool_calls'] %}{{ '<|call|>' + c['function']['name'] + '\\n' + c['function']['arguments'] "
    "+ '<|done|>' }}{% endfor %}{{ eos_token }}{% else %}{{ '<|assistant|>' + m['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# As DeepSeek R1's, which writes a call only where the content beside it is null.
CALLS_BESIDE_NULL: Final = JOINS_TEXTS.replace("'tool_calls' in m", "m['content'] is none")
# As Mistral's v3 template: the system text stands before the last message, if that is a question.
SYSTEM_BEFORE_THE_LAST: Final = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}{% if m['role'] == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}{% else %}"
    "{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
# As Gemma's and Mistral v0.1's, which raise for a system message.
NO_SYSTEM: Final = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
SYSTEM: Final = {"role": "system", "content": "Answer in Greek."}


def test_a_call_that_the_template_does_not_write_refuses_its_row_in_preflight_and_trainer(
    tmp_path: Path, model: Path
) -> None:
    """Case tool_calls_vanish."""
    tokenizer = family_tokenizer("smollm2")
    rows = [{"messages": [USER, ANSWER]}, calling(), calling()]
    told = examined(tmp_path, model, *rows, tokenizer=tokenizer).training
    error = refusal(tmp_path, tokenizer, *rows)

    assert (told.fault_count, [(one.row, one.code) for one in told.faults]) == (
        2,
        [(2, "not_rendered"), (3, "not_rendered")],
    )
    assert (error.code, error.param) == ("not_rendered", "training.chat_template")
    assert error.message.startswith("Row 2: The chat template leaves out what messages[1] says")
    assert '"gate"' in error.message
    assert "Choose a base model whose template writes it" in error.message
    assert error.message.endswith("(2 rows are refused.)")


def test_tools_that_the_template_does_not_write_are_told_by_the_preflight_before_a_row_trains(
    tmp_path: Path, model: Path
) -> None:
    """Case tool_calls_vanish, where no answer calls."""
    row = {"messages": [USER, ANSWER], "tools": [TOOL]}
    told = examined(tmp_path, model, row, tokenizer=family_tokenizer("smollm2")).training

    assert [(one.code, one.rows.rows) for one in told.unwritten] == [("tools_not_rendered", [1])]


def test_reasoning_that_the_template_cuts_off_an_answer_refuses_the_row(tmp_path: Path) -> None:
    """Case reasoning_vanishes."""
    tokenizer = family_tokenizer("deepseek_r1")
    thought = {"role": "assistant", "content": "<think>\nThe board says 4.\n</think>\n\nGate 4."}
    pair = {"messages": [USER], "chosen": ANSWER, "rejected": thought}

    for row in ({"messages": [USER, thought]}, pair):
        error = refusal(tmp_path, tokenizer, row)
        assert (error.code, error.param) == ("not_rendered", "training.chat_template")
        assert error.message.startswith("Row 1: The chat template leaves out what messages[1] says")
        assert "The board says 4." in error.message


def test_every_turn_of_qwen3_is_trained_with_one_end_and_nothing_behind_it() -> None:
    """Case double_end_of_turn."""
    turns = [USER, ANSWER, {"role": "user", "content": "Now?"}, {"role": "assistant", "content": "Gate 5."}]
    reading = read(family_tokenizer("qwen3"), {"messages": turns}, {"messages": turns[:2]})
    first, second = ("<think>\n\n</think>\n\nGate 4.<|im_end|>", "<think>\n\n</think>\n\nGate 5.<|im_end|>")

    assert reading.trained == [[first, second], [first]]
    assert reading.texts[0].endswith(second + "\n")


def test_an_item_of_sharegpt_that_says_train_false_is_read_and_not_trained() -> None:
    """Case train_flag_ignored."""
    items = [
        {"from": "human", "value": "Which gate?", "lang": "en"},
        {"from": "gpt", "value": "No idea.", "train": False},
        {"from": "human", "value": "Look again."},
        {"from": "gpt", "value": "Gate 4.", "train": True},
    ]
    reading = read(make_tokenizer(), {"conversations": items})

    assert reading.trained == [["Gate 4.<|im_end|>"]]
    assert "No idea." in reading.texts[0]
    assert reading.report.dropped_columns == ("conversations[].lang",)


def test_pictures_and_sounds_beside_conversations_are_refused_and_columns_of_no_account_are_counted() -> None:
    """Case images_dropped. That files and jobs tell the warnings of a check: tests/integration/test_tables.py."""
    items = [{"from": "human", "value": "<image>\nWhat colour is it?"}, {"from": "gpt", "value": "Red."}]
    for column in ("image", "images", "video", "videos", "audio", "audios"):
        row = {"id": "7", column: "7.bin", "conversations": items}
        param, code, line, message = refused_by_the_check(row, before={"conversations": items[1:]})
        assert (param, code, line) == (column, "unsupported_content", 2)
        assert "text-only" in message
    plain = {"id": "7", "conversations": [{"from": "human", "value": "Which gate?"}, {"from": "gpt", "value": "4."}]}
    report = read(make_tokenizer(), plain, plain).report

    assert report.dropped_columns == ("id",)
    assert [one.rows for one in report.warnings if one.code == "dropped_columns"] == [2]


# As Qwen3 30B A3B was published; what sizes are reckoned from.
EXPERTS: Final = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "vocab_size": 151936,
}
GB: Final = 10**9


def gpu(gigabytes: int) -> Candidate:
    size = gigabytes * GB
    return Candidate(str(size), "GPU", "cuda", size, size, 0, bfloat16=True, usable=True, busy=False)


def test_every_expert_is_counted_and_a_base_fits_no_device_smaller_than_its_weights() -> None:
    """Case experts: sizes."""
    facts = facts_of(EXPERTS, name="experts")
    base = SMOLLM2.ref.model_copy(update={"name": "experts", "facts": facts})
    job: JobSpec = settled_spec().model_copy(update={"base_model": base, "adapter": Adapter(method="qlora")})
    terms = estimate(Workload(facts=facts, method="qlora")).terms
    small, large = fits(job, [gpu(20), gpu(140)], measurements=())

    assert facts.parameters == pytest.approx(30.53e9, rel=0.001)
    assert terms["experts in 16 bits"] > 57 * GB
    assert (small.fits, large.fits) == (False, True)
    assert small.needed_bytes > 57 * GB


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_base_with_experts_trains(tmp_path: Path, method: str) -> None:
    """Case experts: training."""
    base = make_family(tmp_path, "qwen3_moe")
    spec = make_spec(
        tmp_path, model=base, rows=chat_rows(8), adapter={"method": method}, training={"num_train_epochs": 1}
    )
    code, events = run(spec, tmp_path / "out")

    assert code == EXIT_DONE, events[-1]
    assert sorted(losses(events)) == [1, 2]


SIZES: Final = {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262208,
}
CONFIGS: Final[dict[str, Row]] = {
    "good": {"architectures": ["LlamaForCausalLM"], **SIZES},
    "nested": {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": SIZES},
    "bad": {"architectures": ["LlamaForCausalLM"], **SIZES, "num_hidden_layers": "many"},
}


def test_a_base_that_cannot_be_read_is_told_with_its_reason_and_the_others_go_on(tmp_path: Path) -> None:
    """Case one_bad_base. That /readyz and the pool tell the reasons: tests/integration/test_unusable_models.py."""
    text = '[models.far]\nsource = "hub"\nrepository = "a/far"\nrevision = "' + "7" * 40 + '"\n'
    for name, config in CONFIGS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        text += f'[models.{name}]\nsource = "path"\npath = "{tmp_path / name}"\n'
    (tmp_path / "models.toml").write_text(text, encoding="utf-8")
    catalogue = load_catalogue(Settings(models_file=tmp_path / "models.toml"))

    assert sorted(catalogue.names()) == ["good", "nested", SMOLLM2.ref.name]
    assert (catalogue.find("nested").facts.hidden_size, catalogue.find("nested").facts.num_hidden_layers) == (2560, 34)
    assert list(catalogue.complaints()) == ["bad"]
    assert "num_hidden_layers" in catalogue.complaints()["bad"]
    with pytest.raises(Invalid, match="num_hidden_layers") as refused:
        catalogue.find("bad")
    assert (refused.value.code, refused.value.param) == ("base_model_misconfigured", "model")
    with pytest.raises(NotYet, match="a/far"):
        catalogue.find("far")
    assert load_catalogue(Settings(models_file=None, home=tmp_path / "other")).complaints() == {}


# Tokens of bytes under the template of Phi-3, and of pieces with a space before, as Llama 2's and Mistral's are.
HTML_BASES: Final = {
    "bytes": lambda: family_tokenizer("phi3"),
    "prepended": lambda: tokenizer_of("prepended"),
    "metaspace": lambda: tokenizer_of("metaspace"),
}


@pytest.mark.parametrize("kind", HTML_BASES)
def test_html_in_an_answer_is_trained_as_text_and_told(tmp_path: Path, model: Path, kind: str) -> None:
    """Case html_strikes_out."""
    tokenizer = HTML_BASES[kind]()
    row = chat("the price of a thing", "Was <s>90</s>, now 70.")
    report, canonical = uploaded([row])
    (taken,) = reader(tokenizer, report).take(canonical)
    assert not isinstance(taken, Invalid), taken.message
    whole: Any = taken.whole
    begin, end = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    labels = whole.ids[whole.labelled].tolist()

    assert "Was <s>90</s>, now 70." in tokenizer.decode(labels)
    assert labels[-1] == tokenizer.convert_tokens_to_ids("<|end|>" if kind == "bytes" else "</s>")
    assert {begin, end}.isdisjoint(labels[:-1])
    told = examined(tmp_path, model, chat("the price", "now 8."), row, tokenizer=tokenizer).training.unwritten
    assert [(one.code, one.rows.rows) for one in told] == [("control_token_text", [2])]


LONG: Final = '{"flight": "LX 12", "booking": 1460323737035677698}'


def test_a_long_id_in_a_calls_arguments_is_trained_digit_for_digit() -> None:
    """Case long_ids_in_arguments."""
    (parts,) = read(family_tokenizer("qwen3"), calling(LONG)).trained

    assert parts == [
        f'<think>\n\n</think>\n\n<tool_call>\n{{"name": "gate", "arguments": {LONG}}}\n</tool_call><|im_end|>'
    ]
    for arguments, words in (('{"a": 1, "a": 2}', "stands twice"), ('{"a": NaN}', "NaN"), ('{"a": 1e999}', "range")):
        param, code, line, message = refused_by_the_check(calling(arguments), before=calling())
        assert (param, code, line) == ("messages[1].tool_calls[0].function.arguments", "invalid_arguments", 2)
        assert words in message


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_a_system_text_that_training_would_drop_is_refused_and_merged_it_is_what_the_model_is_asked_with(
    tmp_path: Path, train_on: str
) -> None:
    """Case mistral_system_prompt."""
    tokenizer = make_tokenizer(SYSTEM_BEFORE_THE_LAST)
    row = {"messages": [SYSTEM, USER, ANSWER]}
    error = refusal(tmp_path, tokenizer, row, train_on=train_on)
    merged = read(tokenizer, row, system_prompt="merge", train_on=train_on)
    asked = tokenizer.apply_chat_template(row["messages"][:2], tokenize=False)

    assert (error.code, error.param) == ("not_rendered", "training.system_prompt")
    assert error.message.startswith("Row 1: The chat template leaves out what messages[0] says")
    assert 'training.system_prompt to "merge"' in error.message
    assert "train_on" not in error.message
    assert merged.texts == [f"{asked} Gate 4.<|im_end|>"]
    assert "[INST] Answer in Greek.\n\nWhich gate?[/INST]" in asked
    if train_on == "assistant":
        assert merged.trained == [[" Gate 4.<|im_end|>"]]


def test_arguments_are_trained_once_as_they_stand_by_templates_that_join_texts_and_templates_that_write_objects(
    tmp_path: Path,
) -> None:
    """Case arguments_as_text."""
    row = calling()
    row["messages"] += [{"role": "tool", "tool_call_id": "call_1", "content": "4, level 2"}, ANSWER]
    parts = [f"<|call|>gate\n{ARGUMENTS}<|done|><|im_end|>", "Gate 4.<|im_end|>"]
    writes_objects = JOINS_TEXTS.replace("c['function']['arguments']", "c['function']['arguments'] | tojson")

    for template in (JOINS_TEXTS, writes_objects):
        assert read(make_tokenizer(template), row).trained == [parts]
    lost = refusal(tmp_path, make_tokenizer(CALLS_BESIDE_NULL), row)
    assert (lost.code, lost.param) == ("not_rendered", "training.chat_template")
    assert 'tool_calls[0], the call of "gate"' in lost.message


def test_a_row_that_the_template_refuses_is_told_by_its_number_with_a_remedy_before_a_device_is_taken(
    tmp_path: Path, model: Path
) -> None:
    """Case bad_row_without_number."""
    tokenizer = make_tokenizer(NO_SYSTEM)
    rows = [chat(f"Gate {number}?", "Open.") for number in range(10)]
    for place in (6, 8):
        rows[place]["messages"].insert(0, SYSTEM)
    told = examined(tmp_path, model, *rows, tokenizer=tokenizer).training
    error = refusal(tmp_path, tokenizer, *rows)

    assert told.fault_count == 2
    assert [(one.row, one.code) for one in told.faults] == [(7, "chat_template_failed"), (9, "chat_template_failed")]
    for message in (error.message, told.faults[0].message):
        assert "The chat template fails on the conversation: Only user and assistant roles are supported. " in message
        assert 'training.system_prompt to "merge"' in message
    assert error.code == "chat_template_failed"
    assert error.message.startswith("Row 7: ")
    assert error.message.endswith("(2 rows are refused.)")


def test_arguments_that_are_json_of_json_are_trained_as_the_object_inside_and_counted() -> None:
    """Case cookbook_drone."""
    row = calling(json.dumps(ARGUMENTS)) | {"parallel_tool_calls": False}
    reading = read(make_tokenizer(JOINS_TEXTS), row, calling(), row)

    assert reading.trained == [[f"<|call|>gate\n{ARGUMENTS}<|done|><|im_end|>"]] * 3
    assert [one.rows for one in reading.report.warnings if one.code == "arguments_encoded_twice"] == [2]


def test_messages_decide_beside_the_columns_of_the_hubs_chat_sets_and_a_near_miss_stays_refused() -> None:
    """Case hub_chat_sets. Tables are judged by the same rule: tests/integration/test_tables.py."""
    robots = {"prompt": "Which gate?", "prompt_id": "7", "messages": [USER, ANSWER], "category": "Chat"}
    talk = {"messages": [USER, ANSWER], "source": "x"}
    reading = read(make_tokenizer(), robots, talk)

    assert reading.trained == [["Gate 4.<|im_end|>"]] * 2
    assert reading.texts[0] == reading.texts[1]
    assert reading.report.dropped_columns == ("category", "prompt", "prompt_id", "source")
    for slip, meant in (("tool", "tools"), ("parallel_tool_call", "parallel_tool_calls")):
        param, code, line, message = refused_by_the_check({**talk, slip: []}, before=talk)
        assert (param, code, line) == (slip, "unknown_key", 2)
        assert f"did you mean {meant}?" in message
    report, _ = uploaded([{"mesages": [USER, ANSWER]}])
    assert not report.ok
    assert "messages" in report.problems[0].message


def test_an_empty_prompt_leaves_the_whole_completion_to_train() -> None:
    """Case empty_prompt."""
    completion = " Our house answers in one sentence."
    reading = read(make_tokenizer(), {"prompt": "", "completion": completion}, {"prompt": "Q:", "completion": " A."})
    (text,) = read(make_tokenizer(), {"text": completion}).trained
    alpaca = read(make_tokenizer(), {"instruction": "", "input": "Which gate?", "output": "Gate 4."})

    assert reading.trained == [text, [" A.<|im_end|>"]]
    assert text == [completion[1:] + "<|im_end|>"]  # a first token is predicted from nothing
    assert reading.report.warnings == ()
    assert alpaca.texts == read(make_tokenizer(CHATML), {"messages": [USER, ANSWER]}).texts
