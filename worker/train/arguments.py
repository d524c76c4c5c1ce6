"""How a chat template takes a call's arguments: as an object, or as OpenAI's JSON text (DeepSeek V3, R1, V3.1).

A template that writes `arguments | tojson` would quote a text twice; one that joins texts fails on an object, or has
Python's words for it. So each template is asked once, with a known call.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any, Final

import jinja2

JsonObject = dict[str, Any]

_ARGUMENTS: Final = {"c1ty": "R0me"}
_AS_TEXT: Final = json.dumps(_ARGUMENTS)


def wants_arguments_as_text(render: Callable[..., str]) -> bool:
    """Whether a template writes arguments given as text as they are, and spoils or refuses an object.

    `render` takes messages, and raises TemplateError where the template fails.
    """
    as_object = _probed(render, _ARGUMENTS)
    if as_object and str(_ARGUMENTS) not in as_object:
        return False
    return _probed(render, _AS_TEXT).count(_AS_TEXT) == 1


def _probed(render: Callable[..., str], arguments: Any) -> str:
    """What the template writes of a call with these arguments; empty where it fails."""
    call = {"id": "call12345", "type": "function", "function": {"name": "w3ather", "arguments": arguments}}
    messages = [{"role": "user", "content": "A qu3stion"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    with contextlib.suppress(jinja2.TemplateError):
        return render(messages)
    return ""


def for_template(message: JsonObject, *, arguments_as_text: bool) -> JsonObject:
    """A message in the form templates expect: no `weight`, text content, arguments in the form that they take."""
    clean = {key: value for key, value in message.items() if key != "weight" and value is not None}
    clean.setdefault("content", "")
    if "tool_calls" in clean and not arguments_as_text:
        clean["tool_calls"] = [_with_parsed_arguments(call) for call in clean["tool_calls"]]
    return clean


def _with_parsed_arguments(call: JsonObject) -> JsonObject:
    function = dict(call.get("function", {}))
    with contextlib.suppress(TypeError, ValueError):  # an object already, or no JSON: printed as it is
        function["arguments"] = json.loads(function.get("arguments", "{}"))
    return {**call, "function": function}
