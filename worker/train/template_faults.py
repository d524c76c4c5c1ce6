"""Messages about a chat template that cannot write a row."""

from __future__ import annotations

import jinja2

from shared.errors import Invalid


def not_exact() -> Invalid:
    """The place of an answer is not clear."""
    return Invalid(
        "The chat template changes earlier messages when later ones are added and has no {% generation %} markers, "
        "so the assistant's tokens cannot be told apart exactly. Add the markers in training.chat_template, or set "
        "training.train_on to all. Where it leaves out the reasoning of earlier answers, set"
        " training.drop_history_reasoning.",
        code="chat_template_not_incremental",
        param="training.chat_template",
    )


def template_failed(error: jinja2.TemplateError) -> Invalid:
    reason = str(error).rstrip(".!")
    return Invalid(
        f"The chat template fails on the conversation: {reason}. Write the row as this template has it (where it"
        ' knows no system text, set training.system_prompt to "merge"), choose another base model, or give a template'
        " in training.chat_template.",
        code="chat_template_failed",
        param="training.chat_template",
    )


def template_unusable(what: str) -> Invalid:
    return Invalid(f"The chat template {what}.", code="chat_template_failed", param="training.chat_template")


def too_many_answers(*, seconds: float, messages: int) -> Invalid:
    return template_unusable(
        f"is rendered once for each answer, which takes more than {seconds:g} seconds for a conversation of"
        f" {messages:,} messages; split it"
    )
