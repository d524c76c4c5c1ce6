"""Items of a run of OpenAI's evals: `{"item": {…}, "sample": {…}}`, and what is asked of a model about each. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from shared.contract.evals import (
    CompletionsDataSource,
    FileContent,
    GivenItem,
    InputMessages,
    MessagesTemplate,
    RunOrder,
)
from shared.contract.evaluation_run import ItemFault
from shared.errors import Invalid
from shared.rows import evaluation_items, placeholders
from shared.rows.evaluation_items import LINE_CHARACTERS, EvaluationItem
from shared.rows.json_scores import BadSchema, Schema, TooMuch
from shared.rows.placeholders import BadPlaceholder, NoSuchVariable, TooLong


class UngradableItem(Exception):  # a fact about one item
    """The item cannot be graded. `code` and its words are for the user."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def schema_of(item_schema: Mapping[str, Any]) -> Schema:
    """Raises Invalid, `param` data_source_config.item_schema."""
    try:
        return Schema(item_schema)
    except BadSchema as error:
        param = "data_source_config.item_schema"
        raise Invalid(f"Invalid value for '{param}': it {error}.", param=param) from None


def check_template(messages: InputMessages) -> None:
    """Raises Invalid for a placeholder that no item could fill, and for messages after which no answer follows."""
    if not isinstance(messages, MessagesTemplate):
        return
    for place, message in enumerate(messages.template):
        param = f"data_source.input_messages.template[{place}].content"
        try:
            placeholders.check(message.content)
        except BadPlaceholder as error:
            raise Invalid(
                f"Invalid value for '{param}': '{{{{ {error} }}}}' is no placeholder; write item.NAME.", param=param
            ) from None
    role = messages.template[-1].role
    if role != "user":
        param = f"data_source.input_messages.template[{len(messages.template) - 1}].role"
        why = f"the last message is what is answered; make it user, not {role}"
        raise Invalid(f"Invalid value for '{param}': {why}.", param=param)


def check_content(order: RunOrder) -> None:
    """Raises Invalid for the first inline item that the eval's schema refuses, or that lacks its answer."""
    source = order.data_source.source
    if not isinstance(source, FileContent):
        return
    schema = schema_of(order.item_schema)
    for place, given in enumerate(source.content):
        try:
            _check(order, given, schema)
        except UngradableItem as error:
            param = f"data_source.source.content[{place}]"
            raise Invalid(f"'{param}': {error}", param=param, code=error.code) from None


def items(order: RunOrder, lines: Iterable[bytes]) -> Iterator[EvaluationItem]:
    """The items of a run, at most as many as an evaluation has; `lines`: of its file, if it has one."""
    schema = schema_of(order.item_schema)
    source = order.data_source.source
    if isinstance(source, FileContent):
        for number, given in enumerate(source.content, start=1):
            yield _item(order, given, schema, number=number, line=None)
        return
    written = ((place, line) for place, line in enumerate(lines, start=1) if line.strip())
    for number, (place, line) in enumerate(written, start=1):
        if number > order.max_items:
            return
        try:
            yield _item(order, _given(line), schema, number=number, line=place)
        except UngradableItem as error:
            yield _faulty(number, place, error)


def _given(line: bytes) -> GivenItem:
    try:
        row = json.loads(line.decode("utf-8-sig")) if len(line) <= LINE_CHARACTERS else None
    except (ValueError, RecursionError):
        raise UngradableItem("invalid_json", "The line is no JSON.") from None
    if not isinstance(row, dict) or not isinstance(row.get("item"), dict):
        raise UngradableItem("invalid_row", 'The line is no object {"item": {…}}, or too long for one.')
    sample = row.get("sample")
    return GivenItem(item=row["item"], sample=sample if isinstance(sample, dict) else None)


def _item(order: RunOrder, given: GivenItem, schema: Schema, *, number: int, line: int | None) -> EvaluationItem:
    try:
        _check(order, given, schema)
        if not isinstance(order.data_source, CompletionsDataSource):
            return EvaluationItem(number=number, line=line, row=given.item, given=sample_text(given.sample) or "")
        messages = _messages(order.data_source.input_messages, given.item)
        asked = evaluation_items.of_row({"messages": messages}, number=number, line=line)
        return replace(asked, row=given.item, is_run=True)
    except evaluation_items.NotAnItem as error:
        return _faulty(number, line, UngradableItem("invalid_row", str(error)), row=given.item)
    except UngradableItem as error:
        return _faulty(number, line, error, row=given.item)


def _faulty(
    number: int, line: int | None, error: UngradableItem, *, row: Mapping[str, Any] | None = None
) -> EvaluationItem:
    fault = ItemFault(code=error.code, message=str(error)[:500])
    return EvaluationItem(number=number, line=line, row=row or {}, fault=fault, is_run=True)


def _check(order: RunOrder, given: GivenItem, schema: Schema) -> None:
    try:
        fits = schema.accepts(given.item)
    except (TooMuch, BadSchema) as error:
        raise UngradableItem("invalid_item", f"The item's schema: {error}") from None
    if not fits:
        raise UngradableItem("invalid_item", "The item is not what the eval's data_source_config.item_schema asks for.")
    answered = isinstance(order.data_source, CompletionsDataSource) or sample_text(given.sample) is not None
    if order.reads_sample and not answered:
        raise UngradableItem("no_sample", "The criteria read the answer, and there is none; give sample.output_text.")


def sample_text(sample: Mapping[str, Any] | None) -> str | None:
    """The answer that comes with an item; None: none does."""
    text = (sample or {}).get("output_text")
    if isinstance(text, str):
        return text
    try:
        content = (sample or {})["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        return None
    return content if isinstance(content, str) else None


def _messages(wanted: InputMessages, item: Mapping[str, Any]) -> list[dict[str, Any]]:
    try:
        if isinstance(wanted, MessagesTemplate):
            variables = {"item": item, "sample": {}}
            filled = [(message.role, placeholders.fill(message.content, variables)) for message in wanted.template]
            return [{"role": _role(role), "content": content} for role, content in filled]
        messages = placeholders.reach(item, wanted.item_reference.removeprefix("item."))
    except (NoSuchVariable, BadPlaceholder) as error:
        raise UngradableItem("invalid_variable", f"The item has no {error}.") from None
    except TooLong:
        raise UngradableItem("too_long", "A message is too long with its placeholders filled.") from None
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise UngradableItem("invalid_row", "input_messages.item_reference must name a list of messages.")
    if messages[-1].get("role") == "assistant":
        raise UngradableItem("invalid_row", "The item's messages end in an answer; the last one must be the user's.")
    return [{**each, "role": _role(each.get("role"))} for each in messages]


def _role(role: Any) -> Any:
    """Chat templates know no developer: what it says goes before the conversation, as a system text does."""
    return "system" if role == "developer" else role
