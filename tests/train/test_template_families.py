"""What is trained of a conversation, to the character, with the templates of thirty-six families.

The right values are written from the models' documented formats; docs/data-formats.md shows them as a table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
import trl

from shared.contract.spec import DataFacts, Training
from shared.errors import Invalid
from tests.train.later_templates import HERMES_3
from tests.train.template_families import FAMILIES_OF_TEMPLATES, family_tokenizer
from tests.train.tiny import make_tokenizer
from worker.train.chat import ChatTemplate
from worker.train.data import RowReader
from worker.train.template_abilities import abilities

LOST, FAILS = "not_rendered", "chat_template_failed"


class Written(NamedTuple):
    """How a family writes answers. None or a code: it cannot."""

    end: str
    before: str = ""  # each answer, behind the header
    followed: str = ""  # the end of an answer that a question follows, where it is another
    call: str = LOST
    opening: str = ""  # of all calls of an answer
    between: str = "\n"  # calls
    closing: str = ""
    before_call: str | None = None
    call_end: str = ""
    answered: str = ""  # the end of a call that its result follows, where it is another
    behind_text: str | None = ""  # between text and a call; None: the text is lost
    beside: str = ""  # the whole answer, where text and call are written otherwise
    several_calls: str = ""
    with_tools: str = ""  # a code, where results of calls are refused before the call is looked for
    reasoning: str = LOST
    first: str = ""


_QWEN: Final = '<tool_call>\n{"name": "weather", "arguments": {"city": "CITY"}}\n</tool_call>'
_XML: Final = "<tool_call>\n<function=weather>\n<parameter=city>\nCITY\n</parameter>\n</function>\n</tool_call>"
_LLAMA: Final = '{"name": "weather", "parameters": {"city": "CITY"}}'
_KIMI_CALL: Final = (
    '<|tool_call_begin|>functions.weather:NUMBER<|tool_call_argument_begin|>{"city": "CITY"}<|tool_call_end|>'
)
_KIMI: Final = Written(
    "<|im_end|>",
    opening="<|tool_calls_section_begin|>",
    call=_KIMI_CALL,
    between="",
    closing="<|tool_calls_section_end|>",
    behind_text="",
)
_GPT_OSS_CALL: Final = ' to=functions.weather<|channel|>commentary json<|message|>{"city": "CITY"}'
_GEMMA4_CALL: Final = '<|tool_call>call:weather{city:<|"|>CITY<|"|>}<tool_call|>'
_GEMMA4: Final = Written(  # text beside a call stands behind it; behind a result nobody writes a header
    "<turn|>",
    call=_GEMMA4_CALL,
    between="",
    call_end="<|tool_response>",
    beside=f"{_GEMMA4_CALL}Let me see.<|tool_response>",
)
RIGHT: Final = {
    "qwen2_5": Written("<|im_end|>", call=_QWEN, behind_text="\n"),
    "qwen3": Written(
        "<|im_end|>",
        before="<think>\n\n</think>\n\n",
        call=_QWEN,
        behind_text="\n",
        reasoning="<think>\nA greeting.\n</think>\n\nHello.<|im_end|>",
    ),
    "qwen3_2507": Written("<|im_end|>", call=_QWEN, behind_text="\n"),
    "qwen3_5": Written(  # the header opens the reasoning
        "<|im_end|>",
        before="\n</think>\n\n",
        call=_XML,
        behind_text="\n\n",
        reasoning="A greeting.\n</think>\n\nHello.<|im_end|>",
    ),
    "smollm2": Written("<|im_end|>"),
    "llama2": Written(" </s>", before=" ", first=FAILS, with_tools=FAILS),
    "llama3": Written("<|eot_id|>"),
    "llama3_1": Written("<|eot_id|>", call=_LLAMA, behind_text=None, several_calls=FAILS),
    "llama3_2": Written("<|eot_id|>", call=_LLAMA, behind_text=None, several_calls=FAILS),
    "gemma2": Written("<end_of_turn>", first=FAILS, with_tools=FAILS),
    "gemma3": Written("<end_of_turn>", first=FAILS, with_tools=FAILS),
    "mistral_v3": Written(
        "</s>",
        before=" ",
        before_call="",
        opening="[TOOL_CALLS] [",
        call='{"name": "weather", "arguments": {"city": "CITY"}, "id": "ID"}',
        between=", ",
        closing="]",
        behind_text=None,
    ),
    "phi3": Written("<|end|>"),
    "phi4": Written("<|im_end|>"),
    "deepseek_v3": Written(
        "<｜end▁of▁sentence｜>",
        opening="<｜tool▁calls▁begin｜>",
        call='<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "CITY"}\n```<｜tool▁call▁end｜>',
        closing="<｜tool▁calls▁end｜>",
    ),
    "deepseek_r1": Written("<｜end▁of▁sentence｜>"),
    "gpt_oss": Written(
        "<|return|>",
        followed="<|end|>",
        before="<|channel|>final<|message|>",
        before_call="",
        call=_GPT_OSS_CALL,
        call_end="<|call|>",
        several_calls=LOST,
        beside="<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant" + _GPT_OSS_CALL + "<|call|>",
        reasoning="<|channel|>analysis<|message|>A greeting.<|end|><|start|>assistant"
        "<|channel|>final<|message|>Hello.<|return|>",
    ),
    "glm4_moe": Written(  # no end of turn: a generation stops at the token that opens the next turn
        "<|endoftext|>",
        followed="<|user|>",
        before="\n<think></think>\n",
        call="<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>CITY</arg_value>\n</tool_call>",
        answered="<|observation|>",
        behind_text="\n",
        reasoning="\n<think>A greeting.</think>\nHello.<|endoftext|>",
    ),
    "cohere": Written("<|END_OF_TURN_TOKEN|>", first=FAILS, with_tools=FAILS),
    "lfm2": Written(
        "<|im_end|>",
        opening="<|tool_call_start|>[",
        call="weather(city='CITY')",
        between=", ",
        closing="]<|tool_call_end|>",
        reasoning="<think>A greeting.</think>Hello.<|im_end|>",
    ),
    "nemotron_3": Written(
        "<|im_end|>",
        before="</think>",
        before_call="</think>\n",
        call=_XML,
        closing="\n",
        beside="</think>Let me see.\n" + _XML + "\n<|im_end|>",
        reasoning="A greeting.\n</think>\nHello.<|im_end|>",
    ),
    "granite3": Written("<|end_of_text|>"),
    "olmo2": Written("<|endoftext|>"),
    "zephyr": Written("</s>"),
    "vicuna": Written("</s>", before=" "),
    "devstral": Written("</s>", call='[TOOL_CALLS]weather[ARGS]{"city": "CITY"}', between=""),
    "command_r7b": Written(  # the header behind each conversation is not trained
        "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        before="<|START_RESPONSE|>",
        before_call="",
        opening="<|START_ACTION|>[\n",
        call='    {"tool_call_id": "NUMBER", "tool_name": "weather", "parameters": {"city": "CITY"}}',
        between=",\n",
        closing="\n]<|END_ACTION|>",
        call_end="<|END_OF_TURN_TOKEN|>",
        behind_text=None,
    ),
    "phi4_mini": Written(
        "<|end|>",
        call='<|tool_call|>{"name": "weather", "arguments": {"city": "CITY"}}<|/tool_call|>',
        between="",
    ),
    "hermes_3": Written("<|im_end|>", call=_QWEN, behind_text=None),
    "deepseek_v31": Written(
        "<｜end▁of▁sentence｜>",
        opening="<｜tool▁calls▁begin｜>",
        call='<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "CITY"}<｜tool▁call▁end｜>',
        between="",
        closing="<｜tool▁calls▁end｜>",
    ),
    "granite_4": Written("<|end_of_text|>", call=_QWEN, behind_text="\n"),
    "exaone_4": Written(
        "[|endofturn|]",
        call='<tool_call>{"name": "weather", "arguments": {"city": "CITY"}}</tool_call>',
        behind_text="\n",
    ),
    "minimax_m2": Written(
        "[e~[",
        opening="\n<minimax:tool_call>\n",
        call='<invoke name="weather">\n<parameter name="city">CITY</parameter>\n</invoke>\n',
        between="",
        closing="</minimax:tool_call>",
        reasoning="A greeting.\n</think>\n\nHello.[e~[",
    ),
    "kimi_k2": _KIMI,
    "kimi_k2_first": _KIMI,
    "gemma4": _GEMMA4,
    "diffusion_gemma": _GEMMA4._replace(reasoning="<|channel>thought\nA greeting.\n<channel|>Hello.<turn|>"),
}
STOPS: Final = {  # of the models' generation_config, where the tokenizer does not tell
    "glm4_moe": ("<|endoftext|>", "<|user|>", "<|observation|>"),
    "gemma2": ("<eos>", "<end_of_turn>"),
    "gemma3": ("<eos>", "<end_of_turn>"),
    "phi3": ("<|endoftext|>", "<|end|>"),
    # <|end|> closes an answer that another turn follows; a generation stops at <|return|>, which ends the last one.
    "gpt_oss": ("<|return|>", "<|end|>"),
    "phi4_mini": ("<|endoftext|>", "<|end|>"),
    "gemma4": ("<eos>", "<turn|>", "<|tool_response>"),
    "diffusion_gemma": ("<eos>", "<turn|>", "<|tool_response>"),
}


def question(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(city: str, number: str) -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": city})}}


ROME, OSLO = call("Rome", "call00001"), call("Oslo", "call00002")
RESULT = {"role": "tool", "tool_call_id": "call00001", "content": "21 C"}
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "Where."}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tells the weather.", "parameters": CITY}}]
ASKED = question("Weather?")
ROWS: Final[dict[str, dict[str, Any]]] = {
    "one turn": {"messages": [question("Hi?"), answer("Hello.")]},
    "several": {"messages": [question("Hi?"), answer("Hello."), question("And?"), answer("Bye.")]},
    "assistant first": {"messages": [answer("Welcome."), question("Hi?"), answer("Hello.")]},
    "tools": {"messages": [ASKED, answer("", tool_calls=[ROME]), RESULT, answer("It is 21 C.")], "tools": TOOLS},
    "parallel calls": {"messages": [ASKED, answer("", tool_calls=[ROME, OSLO])], "tools": TOOLS},
    "text beside a call": {"messages": [ASKED, answer("Let me see.", tool_calls=[ROME])], "tools": TOOLS},
    "null content": {"messages": [ASKED, answer(None, tool_calls=[ROME])], "tools": TOOLS},
    "reasoning": {"messages": [question("Hi?"), answer("Hello.", reasoning_content="A greeting.")]},
    "last answer only": {"messages": [question("Hi?"), answer("Hello."), question("And?"), answer("Bye.")]},
    "weight 0 in the middle": {
        "messages": [
            *(question("Hi?"), answer("Hello.")),
            *(question("And?"), answer("Well.", weight=0)),
            *(question("Then?"), answer("Bye.")),
        ]
    },
}


def trained(name: str, row: dict[str, Any], **training: Any) -> list[str] | str:
    """The trained parts of a row, or why it is refused."""
    tokenizer = family_tokenizer(name)
    reader = RowReader(
        tokenizer,
        facts=DataFacts(format="chat", train_rows=1),
        training=Training.model_validate({"max_length": 100_000, **training}),
        ends=STOPS.get(name, (tokenizer.eos_token,)),
    )
    (taken,) = reader.take([row])
    if isinstance(taken, Invalid):
        return taken.code
    edges = np.flatnonzero(np.diff(taken.whole.labelled.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    return [tokenizer.decode(taken.whole.ids[start:end]) for start, end in edges]


def right(name: str) -> dict[str, list[str] | str]:
    """What is to be trained, by the family's format."""
    form = RIGHT[name]
    followed, written = form.followed or form.end, form.before_call
    before_call = form.before if written is None else written
    end_of_call = form.call_end or form.end

    def calls(*cities: str, text: str = "") -> str:
        ids = {"Rome": "call00001", "Oslo": "call00002"}
        written = (form.call.replace("NUMBER", str(place)) for place in range(len(cities)))
        each = form.between.join(
            call.replace("CITY", city).replace("ID", ids[city]) for call, city in zip(written, cities, strict=True)
        )
        return before_call + text + form.opening + each + form.closing

    def last(text: str) -> str:
        return form.before + text + form.end

    hello, well = form.before + "Hello." + followed, last("Bye.")
    one_call = [calls("Rome") + end_of_call]
    no_calls = form.call == LOST
    beside = [calls("Rome", text=f"Let me see.{form.behind_text}") + end_of_call]
    both = [calls("Rome") + (form.answered or end_of_call), last("It is 21 C.")]
    return {
        "one turn": [last("Hello.")],
        "several": [hello, well],
        "assistant first": form.first or [form.before + "Welcome." + followed, last("Hello.")],
        "tools": form.with_tools or (LOST if no_calls else both),
        "parallel calls": form.several_calls or (LOST if no_calls else [calls("Rome", "Oslo") + end_of_call]),
        "text beside a call": LOST
        if no_calls or form.behind_text is None
        else [form.beside.replace("CITY", "Rome")]
        if form.beside
        else beside,
        "null content": LOST if no_calls else one_call,
        "reasoning": LOST if form.reasoning == LOST else [form.reasoning],
        "last answer only": [well],
        "weight 0 in the middle": [hello, well],
    }


@pytest.mark.parametrize("name", FAMILIES_OF_TEMPLATES)
def test_exactly_the_answers_and_their_ends_are_trained(name: str) -> None:
    only_last = {"last answer only": {"train_on": "last_assistant"}}
    seen = {kind: trained(name, row, **only_last.get(kind, {})) for kind, row in ROWS.items()}

    assert seen == right(name)


@pytest.mark.parametrize("name", FAMILIES_OF_TEMPLATES)
def test_every_trained_part_ends_where_a_generation_stops(name: str) -> None:
    stops = STOPS.get(name, (family_tokenizer(name).eos_token,))
    parts = trained(name, ROWS["several"])

    assert isinstance(parts, list)
    assert all(part.endswith(stops) and sum(part.count(stop) for stop in stops) == 1 for part in parts)


ABLE: Final = {
    "qwen3": {"system", "assistant_first", "tools", "calls", "parallel_calls", "text_beside_a_call", "reasoning"},
    "llama3_1": {"system", "assistant_first", "tools", "calls"},
    "smollm2": {"system", "assistant_first"},
    "gemma2": set(),
    "mistral_v3": {"assistant_first", "tools", "calls", "parallel_calls"},
}


@pytest.mark.parametrize("name", ABLE)
def test_a_templates_abilities_are_found_by_asking_it(name: str) -> None:
    told = abilities(ChatTemplate(family_tokenizer(name)), stops=["x"])

    assert {key for key, value in told.model_dump().items() if value is True} - {"earlier_reasoning"} == ABLE[name]
    assert told.end_of_turn == RIGHT[name].end
    assert told.stops == ["x"]


# As TRL keeps them: templates of models that see pictures read content as a list of parts, and write nothing of a text.
IN_PARTS: Final = {
    "smolvlm": ("User: Hi?<end_of_utterance>\nAssistant:", " Hello.<end_of_utterance>"),
    "idefics3": ("User: Hi?<end_of_utterance>\nAssistant:", " Hello.<end_of_utterance>"),
    "llava_next": ("[INST] Hi? [/INST]", " Hello.</s>"),
}


@pytest.mark.parametrize("name", IN_PARTS)
def test_a_template_that_reads_parts_only_is_given_parts(name: str) -> None:
    asked, answered = IN_PARTS[name]
    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = make_tokenizer(template)
    end = answered.removeprefix(" Hello.")
    tokenizer.add_special_tokens({"eos_token": end, "pad_token": end})
    reader = RowReader(tokenizer, facts=DataFacts(format="chat", train_rows=1), training=Training(max_length=1000))
    taken, silent = reader.take([ROWS["one turn"], ROWS["null content"]])

    assert not isinstance(taken, Invalid), taken.message
    row: Any = taken.whole
    assert tokenizer.decode(row.ids[row.labelled]) == answered
    assert asked + answered in tokenizer.decode(row.ids)
    assert isinstance(silent, Invalid)
    assert silent.code == LOST


@pytest.mark.parametrize("name", ["qwen3", "command_r7b", "phi4_mini", "hermes_3", "deepseek_v31", "diffusion_gemma"])
def test_answers_of_a_pair_behind_a_result_are_trained_as_those_of_a_conversation(name: str) -> None:
    tokenizer = family_tokenizer(name)
    facts = DataFacts(format="preference", train_rows=1)
    reader = RowReader(tokenizer, facts=facts, training=Training(max_length=10_000), ends=STOPS.get(name, ()))
    asked = ROWS["tools"]["messages"][:-1]
    (taken,) = reader.take([{"messages": asked, "tools": TOOLS, "chosen": answer("Warm."), "rejected": answer("No.")}])
    form = RIGHT[name]

    assert not isinstance(taken, Invalid), taken.message
    row: Any = taken.whole
    assert [tokenizer.decode(ids) for ids in row.answers] == [
        form.before + text + form.end for text in ("Warm.", "No.")
    ]


def test_a_template_that_fails_without_tools_takes_rows_with_tools() -> None:
    tokenizer = make_tokenizer(HERMES_3.replace("{% if tools %}", "{% if true %}"))
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"})
    facts = DataFacts(format="chat", train_rows=2)
    reader = RowReader(tokenizer, facts=facts, training=Training(max_length=10_000), ends=("<|im_end|>",))
    called, untold, reasoned = reader.take([ROWS["tools"], ROWS["one turn"], {**ROWS["reasoning"], "tools": TOOLS}])

    assert not isinstance(called, Invalid), called.message
    assert tokenizer.decode(called.whole.ids[called.whole.labelled]).endswith("It is 21 C.<|im_end|>")
    assert [row.code for row in (untold, reasoned) if isinstance(row, Invalid)] == [FAILS, LOST]
