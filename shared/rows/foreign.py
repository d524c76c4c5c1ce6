"""Rows as public data sets and other tools write them, rewritten into the shapes of `shared.rows.formats`.

Sources: the data set cards of hh-rlhf, UltraFeedback, dolly-15k, OpenOrca, orca_dpo_pairs, gsm8k, OpenHermes; the data
pages of LLaMA-Factory (`kto_tag`) and ms-swift (`query`, `response`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from shared.rows import hermes, logged, message_forms, services, text_conversations, turn_lists
from shared.rows.formats import Message
from shared.rows.loss_flags import REASONING, REASONING_KEYS
from shared.rows.shapes import Row

# A row with these keys alone needs no rewriting: most rows of most files.
_NATIVE: Final = frozenset({"messages", "tools", "parallel_tool_calls", "functions", "conversations", "text", "system"})
_ANSWERS: Final = ("answer", "response", "output")
_QUESTIONS: Final = ("question", "query")
_WORSE: Final = ("rejected_response", "rejected_messages", "rejected_message")
_OF_TORCHTUNE: Final = {f"{side}_conversations": side for side in ("chosen", "rejected")}
_ASKED: Final = ("messages", "prompt", "conversations", "instruction", "text")
# What the forms read beside the columns of `shared.rows.formats`, and the marks of forms that are refused by name.
COLUMNS: Final = frozenset(
    {*_ANSWERS, *_QUESTIONS, "context", "system_prompt", "kto_tag", "chat", "completions", "train_on_input"}
    | {*_WORSE, *_OF_TORCHTUNE, "preferred_output", "non_preferred_output", "generation", "data"}
    | services.COLUMNS
    | logged.COLUMNS
)
# Columns that may hold messages.
_SPOKEN: Final = frozenset(
    {"messages", "conversations", "prompt", "completion", "chosen", "rejected", "input", *_WORSE[1:]}
    | _OF_TORCHTUNE.keys()
    | {"preferred_completion", "non_preferred_completion", "preferred_output", "non_preferred_output"}
)
_TRUTHS: Final = {"true": True, "1": True, "false": False, "0": False}
_SPEAKER: Final = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


class ConvertedRow(NamedTuple):
    """A row in a shape of ours, the forms it was read from, and for each renamed column the name it has in the file."""

    row: Row
    forms: tuple[str, ...] = ()
    names: Mapping[str, str] = MappingProxyType({})
    dropped: tuple[str, ...] = ()


def recast(row: Row) -> ConvertedRow:
    """Rewrite a row of a known foreign form; every other row comes back as it is. Pure, never raises."""
    row, written = text_conversations.read(row)
    row, logs = logged.read(row)
    row, listed = turn_lists.read(row)
    row, served = services.read(row)
    served = (*written, *logs, *listed, *served)
    tagged = hermes.from_messages(row["messages"]) if _may_be_tagged(row) else None
    if tagged is not None:
        row, served = {**row, "messages": tagged}, (*served, "tagged_calls")
    row, written_as, dropped = _in_our_form(_with_truths(row))
    written_as = (*served, *written_as)
    if row.keys() <= _NATIVE:
        called = _tagged_calls(row) if "conversations" in row else None
        if called is None:
            return ConvertedRow(row, written_as, dropped=dropped)
        return called._replace(forms=("tagged_calls", *written_as), dropped=dropped)
    forms = list(written_as)
    names: dict[str, str] = {}
    for form, read in _FORMS:
        foreign = read(row)
        if foreign is not None:
            row = foreign.row
            forms.append(form)
            names.update(foreign.names)
    return ConvertedRow(row, tuple(forms), names, dropped)


def _may_be_tagged(row: Row) -> bool:
    """A quick look: most conversations have no answer of a tool."""
    messages = row.get("messages")
    return isinstance(messages, list) and any(
        isinstance(message, dict) and message.get("role") == "tool" and "tool_call_id" not in message
        for message in messages
    )


def _with_truths(row: Row) -> Row:
    """The row with the text or the number of its label as true or false, as a table has them."""
    if "label" not in row and "kto_tag" not in row:
        return row
    judged = "kto_tag" in row or "completion" in row
    truths = {tag: truth for tag in ("label", "kto_tag") if (truth := _truth(row.get(tag), judged=judged)) is not None}
    return row | truths


def _truth(value: Any, *, judged: bool) -> bool | None:
    """What a label says; None for all that is neither. A number is one only beside what is surely judged."""
    if isinstance(value, str):
        word = value.strip().casefold()
        return _TRUTHS.get(word) if judged or not word.isdigit() else None
    return bool(value) if judged and type(value) in (int, float) and value in (0, 1) else None


def _in_our_form(row: Row) -> tuple[Row, tuple[str, ...], tuple[str, ...]]:
    """The row with its messages and tools in OpenAI's form, the forms they were read from, and the keys left out."""
    changed: Row = {}
    forms: list[str] = []
    dropped: list[str] = []
    for column, value in row.items():
        if column not in _SPOKEN:
            continue
        nested = isinstance(value, dict) and column == "input"
        messages = value.get("messages") if nested else value
        plain = message_forms.rewritten(messages) if isinstance(messages, list) else None
        if plain is not None:
            changed[column] = {**value, "messages": plain.messages} if nested else plain.messages
            forms += plain.forms
            dropped += message_forms.listed(plain.dropped, column)
    if row.get("tools") and (in_a_list := message_forms.tools_in_a_list(row["tools"])) is not None:
        changed["tools"] = message_forms.bare_tools(in_a_list) or in_a_list
        forms.append("tools")
    elif "tools" in row and not ("conversations" in row or "chosen" in row):
        tools = hermes.tools(row["tools"]) if isinstance(row["tools"], str) and row["tools"] else row["tools"]
        tools = message_forms.bare_tools(tools) or tools
        if tools is not row["tools"]:
            changed["tools"] = tools
            forms.append("tools")
    return ({**row, **changed}, tuple(dict.fromkeys(forms)), tuple(dropped)) if changed else (row, (), ())


def _transcripts(row: Row) -> ConvertedRow | None:
    """hh-rlhf: chosen and rejected, or their prompt, as one text of "Human:" and "Assistant:" turns."""
    sides = {key: row[key] for key in ("prompt", "chosen", "rejected") if isinstance(row.get(key), str)}
    if not {"chosen", "rejected"} <= sides.keys() or _has(row, "messages", "conversations"):
        return None
    first = sides.get("prompt", sides["chosen"])
    if not _is_transcript(first) or ("prompt" not in sides and not _is_transcript(sides["rejected"])):
        return None
    return ConvertedRow(
        {
            **row,
            **{
                key: _turns(text, is_prompt=key == "prompt") if _is_transcript(text) else text
                for key, text in sides.items()
            },
        }
    )


def _is_transcript(text: str) -> bool:
    return text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def _turns(text: str, *, is_prompt: bool) -> list[Message]:
    parts = _SPEAKER.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[who], "content": words.strip()} for who, words in zip(parts[::2], parts[1::2], strict=True)]
    return turns[:-1] if is_prompt and turns[-1] == {"role": "assistant", "content": ""} else turns


def _question(row: Row) -> ConvertedRow | None:
    """orca, gsm8k, ms-swift: a question or query, with an answer or a response."""
    asked = next((key for key in _QUESTIONS if key in row), None)
    if asked is None or any(key in row for key in _ASKED):
        return None
    rest = {key: value for key, value in row.items() if key not in {asked, "system_prompt"}}
    system = {} if row.get("system_prompt") is None else {"system": row["system_prompt"]}
    if "chosen" in row and "rejected" in row:
        return ConvertedRow({**rest, **system, "prompt": row[asked]}, names={"prompt": asked})
    answers = [key for key in (*_ANSWERS, "solution") if isinstance(row.get(key), str)]
    answer = next((key for key in _ANSWERS if key in row), None)
    if row.get("choices") or row.get("options"):
        return None  # of which the question says nothing
    if answer is None or len({row[key] for key in answers}) > 1:
        return None  # which of them is to be trained?
    del rest[answer]
    if isinstance(row.get("rejected_response"), str) and not row.get("history"):  # ms-swift's pairs of text
        del rest["rejected_response"]
        names = {"prompt": asked, "chosen": answer, "rejected": "rejected_response"}
        pair = {"prompt": row[asked], "chosen": row[answer], "rejected": row["rejected_response"]}
        return ConvertedRow({**rest, **system, **pair}, names=names)
    names = {"instruction": asked, "output": answer} | ({"system": "system_prompt"} if system else {})
    if isinstance(rest.get("context"), str) and not rest.get("input"):
        rest["input"] = rest.pop("context")
        names["input"] = "context"
    return ConvertedRow({**rest, **system, "instruction": row[asked], "output": row[answer]}, names=names)


def _dolly(row: Row) -> ConvertedRow | None:
    """dolly: instruction, context, response; distilabel: instruction, generation; others: instruction, answer."""
    answers = [key for key in ("response", "generation", "answer") if key in row]
    if not answers or "instruction" not in row or _has(row, "output", "chosen", "messages", "conversations"):
        return None
    if len({str(row[key]) for key in answers}) > 1:
        return None  # which of them is to be trained?
    answer = answers[0]
    rest = {key: value for key, value in row.items() if key != answer}
    names: dict[str, str] = {"output": answer}
    if not rest.get("input") and "context" in rest:
        rest["input"] = rest.pop("context")
        names["input"] = "context"
    return ConvertedRow({**rest, "output": row[answer]}, names=names)


def _input_pair(row: Row) -> ConvertedRow | None:
    """distilabel's orca pairs: the question is the input of chosen and rejected. Of others it is their conversation."""
    if not _has(row, "chosen") or not _has(row, "rejected") or any(key in row for key in (*_ASKED, *_QUESTIONS)):
        return None
    asked = next((key for key in ("conversation", "input") if row.get(key)), None)
    if asked is None or not (isinstance(row[asked], str) or asked == "conversation"):
        return None
    if isinstance(row["chosen"], list) and len(row["chosen"]) > 1:
        return None  # it begins with the question itself
    rest = {key: value for key, value in row.items() if key != asked}
    return ConvertedRow({**rest, "prompt": row[asked]}, names={"prompt": asked})


def _instruction_pair(row: Row) -> ConvertedRow | None:
    """LLaMA-Factory's pairs: instruction and input, with chosen and rejected."""
    if "instruction" not in row or "chosen" not in row or "rejected" not in row or _has(row, "prompt", "messages"):
        return None
    question = _joined(row)
    if question is None or row.get("history"):
        return None
    rest = {key: value for key, value in row.items() if key not in {"instruction", "input"}}
    return ConvertedRow({**rest, "prompt": question}, names={"prompt": "instruction"})


def _joined(row: Row) -> str | None:
    parts = (row.get("instruction"), row.get("input") or "")
    return "\n\n".join(filter(None, parts)) if all(isinstance(part, str) for part in parts) else None


def _tagged(row: Row) -> ConvertedRow | None:
    """LLaMA-Factory's KTO: a whole conversation, or an Alpaca row, with `kto_tag` or `label`."""
    tag = "kto_tag" if "kto_tag" in row else "label"
    if not isinstance(row.get(tag), bool) or (tag == "label" and "completion" in row) or row.get("history"):
        return None
    rest = {key: value for key, value in row.items() if key != tag}
    if "completion" in rest:
        return ConvertedRow({**rest, "label": row[tag]}, names={"label": tag})
    talk = next((key for key in ("messages", "conversations") if isinstance(rest.get(key), list)), None)
    if talk is not None and len(rest[talk]) > 1:
        *asked, answer = rest.pop(talk)
        return ConvertedRow({**rest, "messages": asked, "completion": [answer], "label": row[tag]})
    if talk is None and isinstance(rest.get("output"), str) and _joined(rest):
        asked = [{"role": "user", "content": _joined(rest)}]
        rest = {key: value for key, value in rest.items() if key not in {"instruction", "input", "output"}}
        names = {"completion": "output"}
        return ConvertedRow({**rest, "messages": asked, "completion": row["output"], "label": row[tag]}, names=names)
    return None


def _rejected(row: Row) -> ConvertedRow | None:
    """ms-swift, OpenPipe: a conversation that ends with the better answer, and the worse one in a column of its own."""
    worse = next((key for key in _WORSE if row.get(key) is not None), None)
    talk = row.get("messages")
    if worse is None or not isinstance(talk, list) or len(talk) < 2 or _has(row, "chosen", "rejected"):
        return None
    rest = {name: value for name, value in row.items() if name not in {"messages", worse}}
    names = {"chosen": "messages", "prompt": "messages", "rejected": worse}
    if worse == "rejected_messages":
        return ConvertedRow({**rest, "chosen": talk, "rejected": row[worse]}, names=names)
    return ConvertedRow({**rest, "prompt": talk[:-1], "chosen": talk[-1:], "rejected": row[worse]}, names=names)


def _preferred_outputs(row: Row) -> ConvertedRow | None:
    """Pairs as OpenAI's guide, Fireworks and Together name them; OpenAI's reference says preferred_completion."""
    names = {f"{side}_completion": f"{side}_output" for side in ("preferred", "non_preferred")}
    if not all(column in row for column in names.values()) or _has(row, *names):
        return None
    rest = {name: value for name, value in row.items() if name not in names.values()}
    return ConvertedRow({**rest, **{name: row[column] for name, column in names.items()}}, names=names)


def _chosen_conversations(row: Row) -> ConvertedRow | None:
    """torchtune's pairs of whole conversations."""
    if not all(isinstance(row.get(column), list) for column in _OF_TORCHTUNE) or _has(row, *_OF_TORCHTUNE.values()):
        return None
    pair = {_OF_TORCHTUNE.get(name, name): value for name, value in row.items()}
    return ConvertedRow(pair, names={ours: theirs for theirs, ours in _OF_TORCHTUNE.items()})


def _null_question(row: Row) -> ConvertedRow | None:
    """A prompt or an instruction that is null: nothing is asked, as where it is empty."""
    pairs = (("prompt", "completion"), ("instruction", "output"))
    empty = {
        asked: "" for asked, answer in pairs if row.get(asked, "") is None and isinstance(row.get(answer), str | list)
    }
    return ConvertedRow({**row, **empty}) if empty else None


def _system_column(row: Row) -> ConvertedRow | None:
    """OpenHermes, orca: the system text under the name system_prompt."""
    if not row.get("system_prompt") or row.get("system"):
        return None
    rest = {name: value for name, value in row.items() if name != "system_prompt"}
    return ConvertedRow({**rest, "system": row["system_prompt"]}, names={"system": "system_prompt"})


def _reasoned(row: Row) -> ConvertedRow | None:
    """Reasoning in a column of its own, beside a question and its answer."""
    named = [key for key in REASONING_KEYS if isinstance(row.get(key), str) and row[key].strip()]
    if len(named) != 1 or not {"instruction", "output"} <= row.keys() or row[named[0]] in ("on", "off"):
        return None
    rest = {key: value for key, value in row.items() if key != named[0]}
    return ConvertedRow({**rest, REASONING: row[named[0]]}, names={REASONING: named[0]})


def _tagged_calls(row: Row) -> ConvertedRow | None:
    """Hermes: calls and their answers within text, in tags of their own."""
    messages = None if _has(row, "messages") else hermes.messages(row.get("conversations"))
    if messages is None:
        return None
    rest = {name: value for name, value in row.items() if name != "conversations"}
    tools = rest.get("tools")
    if isinstance(tools, str):
        rest["tools"] = hermes.tools(tools)
    return ConvertedRow({**rest, "messages": messages})


def _has(row: Row, *keys: str) -> bool:
    return any(row.get(key) is not None for key in keys)


_FORMS: Final[tuple[tuple[str, Callable[[Row], ConvertedRow | None]], ...]] = (
    ("tagged_calls", _tagged_calls),
    ("transcript", _transcripts),
    ("question", _question),
    ("dolly", _dolly),
    ("instruction_pair", _instruction_pair),
    ("input_pair", _input_pair),
    ("reasoned", _reasoned),
    ("tagged", _tagged),
    ("rejected", _rejected),
    ("preferred_outputs", _preferred_outputs),
    ("system_column", _system_column),
    ("chosen_conversations", _chosen_conversations),
    ("null_question", _null_question),
)

# What the report says of each form; the rows are counted beside it.
SAYS: Final = {
    **services.SAYS,
    **turn_lists.SAYS,
    **text_conversations.SAYS,
    **logged.SAYS,
    "transcript": "Texts of Human: and Assistant: turns were read as messages.",
    "question": "A question or query and its answer were read as a conversation.",
    "dolly": "instruction, context and response (answer, generation) were read as instruction, input and output.",
    "instruction_pair": "instruction and input were read as the prompt of chosen and rejected.",
    "input_pair": "input (or conversation) was read as the prompt of chosen and rejected.",
    "reasoned": "reasoning, thinking or reasoning_content beside an answer was read as its reasoning_content.",
    "tagged": "The last answer of a conversation was read as the completion of its label or kto_tag.",
    "tagged_calls": "<tool_call> and <tool_response> in text were read as calls and their answers.",
    "rejected": "The last answer was read as chosen, rejected_response, rejected_message(s) as rejected.",
    "chosen_conversations": "chosen_conversations and rejected_conversations were read as chosen and rejected.",
    "train_flag": "train, training, trainable and loss of messages were read as their weight.",
    "reasoning": "reasoning and thinking of messages were read as reasoning_content.",
    "arguments_as_object": "Arguments given as an object were read as its JSON text.",
    "calls_without_ids": "Calls and answers without ids were given some, in their order.",
    "capitals": "Speakers in capitals (User, GPT) were read in small letters.",
    "cohere_roles": "Roles System, User and Chatbot were read as system, user and assistant.",
    "bare_calls": "Calls of name and arguments (parameters, args, input) were read as calls of functions.",
    "response_items": "Items of the Responses API (function_call, …) were read as calls, results and reasoning.",
    "listed_calls": "tool_calls as one object or as JSON text were read as a list of calls.",
    "results_as_objects": "Results of tools given as objects were read as their JSON text.",
    "call_roles": "Messages of role tool_call or function_call were read as calls, those of tool_response as answers.",
    "parts": "Parts of type input_text, output_text, refusal or thinking were read as text or reasoning_content.",
    "tools": "tools as JSON text, as one object or as bare functions were read as a list of tools.",
    "preferred_outputs": "preferred_output and non_preferred_output were read as the two completions.",
    "null_question": "A prompt or instruction that is null was read as an empty one.",
    "system_column": "system_prompt was read as the system message.",
}
