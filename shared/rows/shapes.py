"""Tells the shape of a training row from its keys alone. Pure; the command line carries this very module, too."""

from __future__ import annotations

from typing import Any, Final, Literal

Row = dict[str, Any]

# What users bring. "openai_preference" is the OpenAI wire's row, "chosen_rejected" ours and TRL's,
# "conversational" TRL's prompt and completion as lists of messages.
Shape = Literal[
    "chat",
    "prompt_completion",
    "text",
    "openai_preference",
    "chosen_rejected",
    "kto",
    "conversational",
    "sharegpt",
    "alpaca",
]

# The first key that the row has decides.
_MARKS: tuple[tuple[str, Shape], ...] = (
    ("preferred_completion", "openai_preference"),
    ("non_preferred_completion", "openai_preference"),
    ("preferred_output", "openai_preference"),
    ("non_preferred_output", "openai_preference"),
    ("chosen", "chosen_rejected"),
    ("rejected", "chosen_rejected"),
    ("messages", "chat"),
    ("conversations", "sharegpt"),
    ("instruction", "alpaca"),
    ("prompt", "prompt_completion"),
    ("completion", "prompt_completion"),
    ("text", "text"),
)
MARKS: Final = tuple(key for key, _ in _MARKS)


# Forms that hold more than one row of ours would, or bury calls in text: how to convert them.
_TOLD: tuple[tuple[frozenset[str], str], ...] = (
    (
        frozenset({"instruction", "completions"}),
        "The row holds several rated completions, as UltraFeedback's raw set does; write its best and its worst as"
        " prompt, chosen and rejected, or take the binarized set.",
    ),
    (
        frozenset({"generations"}),
        "The row holds several answers (generations), as distilabel's sets do; write the one to train as output, or the"
        " better and the worse as chosen and rejected.",
    ),
    (
        frozenset({"prompt", "answers"}),
        "The row holds several ranked answers, as Nectar's do; write its best and its worst as prompt, chosen and"
        " rejected.",
    ),
    (
        frozenset({"response1", "response2"}),
        "The row holds two answers and which is preferred, as HelpSteer3's do; write the better as chosen, the other as"
        " rejected, and context as prompt.",
    ),
    (
        frozenset({"response_a", "response_b"}),
        "The row holds two answers and which won; write the better as chosen and the other as rejected.",
    ),
    (
        frozenset({"conversation_a", "conversation_b"}),
        "The row holds two conversations and which won, as the Chatbot Arena's do; write the better as chosen and the"
        " other as rejected, without ties.",
    ),
    (
        frozenset({"human_ref_A", "human_ref_B"}),
        "The row holds two answers and which is preferred, as SHP's do; write history as prompt, the better as chosen,"
        " the other as rejected.",
    ),
    (
        frozenset({"message_id", "parent_id", "role"}),
        "The row is one message of a tree, as OpenAssistant's are; write each way from a question to its last answer as"
        " messages, prompter as user.",
    ),
    (
        frozenset({"message_tree_id", "prompt"}),
        "The row holds a tree of replies, as OpenAssistant's do; write each way from the prompt to a last answer as"
        " messages, prompter as user.",
    ),
    *(
        (
            frozenset({"question", choices}),
            f"The row's question stands beside {choices} that it does not hold; write them into the question, and"
            f" remove {choices}.",
        )
        for choices in ("choices", "options")
    ),
    (
        frozenset({"response_0", "response_1"}),
        "The row holds two answers and which is better or safer, as PKU-SafeRLHF's do; write the better as chosen, the"
        " other as rejected.",
    ),
    (
        frozenset({"prompt", "completions"}),
        "The row holds several completions of its prompt; write the one to train as completion, or the better and the"
        " worse as chosen and rejected.",
    ),
    (
        frozenset({"chat_messages"}),
        "The row is a conversation of claude.ai's export; write its chat_messages as messages, each with role (human is"
        " user) and content (its text), without those that had attachments.",
    ),
    (
        frozenset({"mapping"}),
        "The row is a conversation of ChatGPT's export, a tree of messages (mapping); write the branch that ends at"
        " current_node as messages, each with role (author.role) and content (the text of content.parts).",
    ),
    (
        frozenset({"chat_history", "message"}),
        "The row holds a question (message) beside the turns before it (chat_history), as Cohere's first API did; write"
        " all of them as messages, USER as user and CHATBOT as assistant, the answer last.",
    ),
    (
        frozenset({"custom_id", "response"}),
        "The row is an answer of a batch without its question; join it with the line of the batch's input that has its"
        " custom_id, and write both as messages.",
    ),
    (
        frozenset({"chat", "meta_instruction"}),
        "The row holds turns of Human and MOSS in one object (chat), as MOSS' sets do; write Human as user and MOSS as"
        " assistant in messages, without <eoh> and <eom>.",
    ),
    (
        frozenset({"chat"}),
        "The row holds a whole conversation as one text (chat), as glaive's sets do; split it at USER:, ASSISTANT: and"
        " FUNCTION RESPONSE: into messages, each <functioncall> into tool_calls, the functions of system into tools.",
    ),
    (
        frozenset({"query", "answers"}),
        "The row's answers hold no calls, as xlam's do: a list of objects of name and arguments, or its JSON text;"
        " write a row that is answered in words as messages, or remove it.",
    ),
    (
        frozenset({"segments"}),
        "The row holds segments with labels, as axolotl's input_output sets do; write prompt and completion, or"
        " messages with weight 0 where nothing is trained.",
    ),
)
# Columns that are a question and its answer under other names, in small letters: told, not guessed.
_PAIRS: Final = (
    *(
        (asked, answer)
        for asked in ("instruction", "prompt")
        for answer in ("output", "completion", "response", "answer")
    ),
    *((asked, answer) for asked in ("question", "query") for answer in ("answer", "response", "output")),
    ("problem", "deepseek_solution"),
    ("problem", "solution"),
    ("problem", "answer"),
    ("problem", "generated_solution"),
    ("question", "generated_solution"),
    *((long, "summary") for long in ("article", "document", "dialogue", "text")),
    ("question", "deepseek_attempt"),
    ("question", "attempt"),
    ("question", "solution"),
    ("input", "output"),
    ("inputs", "targets"),
    ("inputs", "outputs"),
    ("source", "target"),
    ("input", "target"),
    ("input", "content"),
    ("input", "expectedoutput"),
    ("input", "expected_output"),
    ("text_input", "output"),
    ("input_text", "output_text"),
    ("context", "response"),
    ("user", "assistant"),
    ("human", "assistant"),
    ("patient", "doctor"),
    ("message_1", "message_2"),
)
# What may stand beside them, and the name that it has here.
_BESIDE: Final = {
    **dict.fromkeys(("system", "system_prompt"), "system"),
    "input": "input",
    **dict.fromkeys(("complex_cot", "cot", "chain_of_thought", "reasoning", "thinking"), "reasoning_content"),
    **dict.fromkeys(("deepseek_reasoning", "deepseek_thinking_trajectory", "reasoning_content"), "reasoning_content"),
}
# The better and the worse of two answers under other names.
_SIDES: Final = (
    ("preferred", "non_preferred"),
    ("preferred", "rejected"),
    ("chosen_response", "rejected_response"),
    ("chosen_answer", "rejected_answer"),
    ("accepted", "rejected"),
    ("response_j", "response_k"),
    ("positive", "negative"),
    ("winner", "loser"),
    ("better", "worse"),
)
_ANSWERS: Final = ("answer", "response", "output", "solution")
_IDEALS: Final = ("ideal", "expectedOutput", "expected_output", "target", "answer", "response")
# Columns beside which several answers, or a tree, are no row of the shape that the other columns would make.
_OF_ROWS: Final = frozenset(MARKS)
_WHOLE: Final = frozenset({"completion", "output", "chosen", "messages", "conversations"})


class UnknownShape(ValueError):
    """The row's keys belong to no known format. The message names the keys and the formats."""

    code = "unknown_format"


def detect(row: Row) -> Shape:
    """Tell the shape of a row from its keys alone.

    Raises:
        UnknownShape: no format has these keys.
    """
    if _is_columnar(row):
        raise UnknownShape("The object holds whole columns as lists; write one object for each row (orient='records').")
    shape = next((shape for key, shape in _MARKS if key in row), None)
    if shape in {"chat", "prompt_completion"} and "label" in row and "completion" in row:
        return "kto"
    if shape == "prompt_completion" and any(isinstance(row.get(key), list) for key in ("prompt", "completion")):
        return "conversational"
    if not shape or not _WHOLE & row.keys():
        _refuse_by_name(row)
    if shape:
        return shape
    under = _rows_under(row)
    if under is not None:
        raise UnknownShape(f"The rows lie in a list under {under[:80]}; upload that list itself, or one row per line.")
    within = next((key for key, value in row.items() if isinstance(value, dict) and _WHOLE & value.keys()), None)
    if within is not None:
        raise UnknownShape(f"The row lies under {within[:80]}; write its keys at the top, with the answer among them.")
    if {"request", "response"} <= row.keys():
        raise UnknownShape(
            "The row is a request and its response that make no conversation: it needs contents of text and"
            " calls, and one answer that is whole, not cut at a limit or held back; write it as messages, or remove it."
        )
    keys = ", ".join(sorted(row)[:8]) or "none"
    several = [key for key in _ANSWERS if isinstance(row.get(key), str)]
    asked = next((key for key in ("question", "query") if key in row), None)
    if asked is not None and len(several) > 1:
        named = f'{{"instruction": "{asked}", "output": "{several[-1]}"}}'
        raise UnknownShape(
            f"The row has more than one answer ({', '.join(several)}); name the one to train in training.columns, as"
            f" {named}."
        )
    columns = _told_columns(row)
    if any(key.strip().lower() == mark != key for key in row for mark, _ in _MARKS):
        remedy = f"write them small{f', or set training.columns to {columns}' if columns else ''}"
        raise UnknownShape(f"The row's keys ({keys[:200]}) differ from known ones in capitals or spaces; {remedy}.")
    if columns is not None:
        raise UnknownShape(f"The row's keys belong to no known format; set training.columns to {columns} in the job.")
    raise UnknownShape(
        f"The row's keys ({keys[:200]}) belong to no known format; use messages (chat), prompt and completion, text,"
        " input with preferred_completion and non_preferred_completion, or completion with label; or name the columns"
        " in training.columns of the job."
    )


def _refuse_by_name(row: Row) -> None:
    """Raises UnknownShape, with the way to convert it, for a row that is told from its keys to be of another form."""
    chat = row.get("chat")
    if isinstance(chat, dict) and isinstance(chat.get("messages"), list):
        raise UnknownShape(
            "The row is a conversation of Open WebUI's export; write its chat.messages as messages, each with role and"
            " content alone."
        )
    for marks, sentence in _TOLD:
        if marks <= row.keys() and not _is_talk(chat):
            raise UnknownShape(sentence)
    sides = next((pair for pair in _SIDES if all(isinstance(row.get(key), str) for key in pair)), None)
    if sides is not None:
        columns = f'{{"chosen": "{sides[0]}", "rejected": "{sides[1]}"}}'
        raise UnknownShape(f"The row holds two answers, {sides[0]} and {sides[1]}; set training.columns to {columns}.")


def _told_columns(row: Row) -> str | None:
    """What `training.columns` may say of a row: where its messages lie, or its question and answer."""
    talks = (key for key, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict))
    for key in talks:
        first = row[key][0]
        if not ({"role", "content"} <= first.keys() or {"from", "value"} <= first.keys()):
            continue
        ideal = next((name for name in _IDEALS if isinstance(row.get(name), str)), None)
        if ideal is not None and isinstance(row[key][-1], dict) and row[key][-1].get("role") == "user":
            return f'{{"prompt": "{key[:80]}", "completion": "{ideal}"}}'
        if not {"output", "outputs"}.isdisjoint(row):
            continue  # its answer stands there, in a form that is not read
        return f'{{"{"messages" if "role" in first else "conversations"}": "{key[:80]}"}}'
    names = {
        key.strip().casefold(): key
        for key, value in row.items()
        if isinstance(value, str) and value not in ("on", "off")
    }
    if "text" in names and len(row) == 1:
        return f'{{"text": "{names["text"][:80]}"}}'
    pair = next((pair for pair in _PAIRS if set(pair) <= names.keys()), None)
    if pair is None:
        return None
    asked, answer = (names[name] for name in pair)
    beside = {_BESIDE[name]: key for name, key in names.items() if name in _BESIDE and name not in pair}
    more = "".join(f', "{ours}": "{key}"' for ours, key in beside.items())
    chat = f'{{"instruction": "{asked}", "output": "{answer}"{more}}}'
    if beside:
        return chat  # text has no place for them
    return f'{chat} (a chat) or {{"prompt": "{asked}", "completion": "{answer}"}} (text without a chat template)'


def _rows_under(row: Row) -> str | None:
    """The key of an object that holds rows, as `{"data": […]}`; None where it is a conversation, or no such.

    Beside other keys (a version) the rows must be of a known shape.
    """
    if len(row) != 1:
        lists = ((key, value) for key, value in row.items() if isinstance(value, list) and value)
        return next((key for key, value in lists if isinstance(value[0], dict) and _OF_ROWS & value[0].keys()), None)
    ((key, value),) = row.items()
    first = value[0] if isinstance(value, list) and value else None
    return key if isinstance(first, dict) and not {"role", "from", "content", "value"} & first.keys() else None


def _is_talk(value: Any) -> bool:
    """A list of messages or of items."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and bool({"role", "from"} & first.keys())


def _is_columnar(row: Row) -> bool:
    """Whether each value is a list of texts, all of one length, as pandas and datasets write whole tables."""
    values = list(row.values())
    if len(values) < 2 or not all(isinstance(value, list) and value for value in values):
        return False
    return len({len(value) for value in values}) == 1 and all(isinstance(value[0], str) for value in values)
