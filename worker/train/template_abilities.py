"""The abilities of a chat template, learnt by rendering known conversations once. Rows are judged by them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from shared.contract.events import TemplateAbilities
from shared.errors import Invalid
from worker.train.chat import ChatTemplate
from worker.train.written import lost

JsonObject = dict[str, Any]


def _question(text: str) -> JsonObject:
    return {"role": "user", "content": text}


def _answer(text: str, **more: Any) -> JsonObject:
    return {"role": "assistant", "content": text, **more}


def _call(number: int) -> JsonObject:
    arguments = json.dumps({"c1ty": f"R0me{number}"})
    return {"id": f"call0000{number}", "type": "function", "function": {"name": "w3ather", "arguments": arguments}}


_PROPERTIES: Final = {"c1ty": {"type": "string", "description": "Wh3re."}}
_TOOLS: Final = [
    {
        "type": "function",
        "function": {
            "name": "w3ather",
            "description": "Tells the w3ather.",
            "parameters": {"type": "object", "properties": _PROPERTIES},
        },
    }
]
_RESULT: Final = {"role": "tool", "tool_call_id": "call00001", "content": "tw3nty"}
_ASKED: Final = _question("A qu3stion")
_THOUGHT: Final = _answer("An answ3r", reasoning_content="A th0ught")
_PROBES: Final[dict[str, tuple[list[JsonObject], list[JsonObject] | None]]] = {
    "system": ([{"role": "system", "content": "A syst3m text"}, _ASKED, _answer("An answ3r")], None),
    "assistant_first": ([_answer("Welc0me"), _ASKED, _answer("An answ3r")], None),
    "tools": ([_ASKED, _answer("An answ3r")], _TOOLS),
    "calls": ([_ASKED, _answer("", tool_calls=[_call(1)]), _RESULT, _answer("An answ3r")], None),
    "parallel_calls": ([_ASKED, _answer("", tool_calls=[_call(1), _call(2)])], None),
    "text_beside_a_call": ([_ASKED, _answer("Let me s3e", tool_calls=[_call(1)])], None),
    "reasoning": ([_ASKED, _THOUGHT], None),
    "earlier_reasoning": ([_ASKED, _THOUGHT, _question("An0ther"), _answer("An0ther answ3r")], None),
}


def abilities(template: ChatTemplate, *, stops: Sequence[str]) -> TemplateAbilities:
    """The abilities of `template`; a generation of its base model ends with one of `stops`."""
    able = {name: _writes(template, messages, tools) for name, (messages, tools) in _PROBES.items()}
    return TemplateAbilities(
        **able,
        arguments="text" if template.arguments_as_text else "object",
        end_of_turn=template.end_of_turn,
        stops=list(stops),
    )


def _writes(template: ChatTemplate, messages: list[JsonObject], tools: list[JsonObject] | None) -> bool:
    prepared = template.prepared(messages)
    try:
        rendered = template.render_with_spans(prepared, tools=tools)
    except Invalid:
        return False
    return not lost(prepared, tools=tools, text=rendered.text, spans=rendered.spans)
