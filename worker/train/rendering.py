"""A chat template at work, as transformers runs it, and what it takes for now.

transformers first makes a copy of all that a template sees, for callers may hand it any object. Rows are plain JSON, so
here a template sees them as they are; that is a fifth of the time of reading. A test compares both for all families.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

JsonObject = dict[str, Any]
Now = datetime | None  # None: the present, by the host's clock
_CLOCK: Final = "strftime_now"


def read_time(written: str | None) -> datetime:
    """The moment that a job names, in UTC without a zone; None: now."""
    return datetime.now(UTC).replace(tzinfo=None) if written is None else datetime.fromisoformat(written)


def rendered(
    template: str,
    messages: Sequence[JsonObject],
    *,
    tools: Any,
    names: Mapping[str, Any],
    now: Now = None,
    add_generation_prompt: bool = False,
) -> str:
    """What `template` writes of messages without nulls. `names`: of special tokens, which it may ask for."""
    # Not at the top: a preflight says that it does without PyTorch before transformers is imported.
    from transformers.utils.chat_template_utils import _alias_reasoning_fields, _compile_jinja_template

    clock = {} if now is None else {_CLOCK: now.strftime}
    text: str = _compile_jinja_template(template).render(
        messages=_alias_reasoning_fields(messages),
        tools=tools,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **{**names, **clock},
    )
    return text


def masked(tokenizer: Any, messages: Sequence[JsonObject], *, template: str, tools: Any, now: Now) -> Any:
    """The tokens of `messages`, and which of them stand between a template's markers."""
    with _clock_stopped(template, at=now):
        return tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=template, return_assistant_tokens_mask=True
        )


@contextlib.contextmanager
def _clock_stopped(template: str, *, at: Now) -> Iterator[None]:
    """Let `template` write the moment `at` while the body runs, in which transformers renders it."""
    if at is None:
        yield
        return
    from transformers.utils.chat_template_utils import _compile_jinja_template

    compiled = _compile_jinja_template(template)  # the very object that is rendered: transformers keeps them
    compiled.globals[_CLOCK] = at.strftime
    try:
        yield
    finally:
        del compiled.globals[_CLOCK]  # transformers' own lies beneath
