"""`tunepool chat`: talk to a model in the terminal, or to two of them side by side."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from tunepool import adapters, official, watching
from tunepool.printing import json_line, plain, printable
from tunepool.requests import check_model, given

if TYPE_CHECKING:
    from openai import OpenAI

# The server holds a question for a minute while it loads a model, and says so then.
PATIENCE_SECONDS: Final = 300.0


@dataclass
class ChatSide:
    """One model of the conversation, and all that was said with it."""

    title: str
    model: str
    disabled: bool
    messages: list[dict[str, str]] = field(default_factory=list)
    answer: str = ""

    def ask(self, client: OpenAI, question: str, **options: Any) -> Iterator[None]:
        """Have `answer` grow to what the model says, a piece at a time."""
        self.messages.append({"role": "user", "content": question})
        self.answer = ""
        extension = {"tunepool": {"disabled": True}} if self.disabled else None
        messages: Any = self.messages
        stream = client.chat.completions.create(
            model=self.model, messages=messages, stream=True, extra_body=extension, **options
        )
        with stream:
            for chunk in stream:
                self.answer += (chunk.choices[0].delta.content or "") if chunk.choices else ""
                yield
        self.messages.append({"role": "assistant", "content": self.answer})


def chat(  # noqa: PLR0917 -- typer makes options of them
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A base model, an alias, `ft:…`, `ft:…:ckpt-step-N` or a combination.")],
    against: Annotated[
        str | None,
        typer.Option(help="Another model beside it. The model's own base is the same weights without the adapter."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message before the first question.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of each answer.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same text twice on one device.")] = None,
) -> None:
    """Talk to a model: each line is a question. Ends with the input, or by Ctrl-D."""
    client: OpenAI = context.obj.client.with_options(timeout=PATIENCE_SECONDS)
    options = given(temperature=temperature, max_completion_tokens=max_tokens, seed=seed)
    voices = [ChatSide(model, model, disabled=False)]
    if against is not None:
        voices.append(_other(client, model, against))
    for voice in voices:
        check_model(client, voice.model)
    for voice in voices if system else ():
        voice.messages.append({"role": "system", "content": str(system)})
    with watching.interruptible_work(left="The conversation is over; an answer in the making is given up."):
        for question in _questions():
            if context.obj.as_json:
                _answer_in_json(client, voices, question, options)
            else:
                _answer(client, voices, question, options)


def _other(client: OpenAI, model: str, against: str) -> ChatSide:
    """The model beside: for the base of an adapter the adapter switched off, which loads nothing anew."""
    try:
        base = adapters.describe(client, model)["base_model"]
    except official.NotFoundError:  # no adapter
        base = None
    if base == against:
        return ChatSide(f"{against} (adapter off)", model, disabled=True)
    return ChatSide(against, against, disabled=False)


def _questions() -> Iterator[str]:
    asks = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if asks else "").strip()
        except EOFError:
            return
        if line:
            yield line


def _answer_in_json(client: OpenAI, voices: list[ChatSide], question: str, options: dict[str, Any]) -> None:
    for voice in voices:
        for _ in voice.ask(client, question, **options):
            pass
        print(json_line({"model": voice.model, "disabled": voice.disabled, "content": voice.answer}))


def _answer(client: OpenAI, voices: list[ChatSide], question: str, options: dict[str, Any]) -> None:
    if len(voices) == 1:
        _speak(client, voices[0], question, options)
        return
    for voice in voices:
        voice.answer = ""
    with Live(_side_by_side(voices), console=Console(), auto_refresh=False) as live:
        for voice in voices:
            for _ in voice.ask(client, question, **options):
                live.update(_side_by_side(voices), refresh=live.console.is_terminal)
        live.refresh()


def _speak(client: OpenAI, voice: ChatSide, question: str, options: dict[str, Any]) -> None:
    """Each piece as it comes."""
    shown = 0
    for _ in voice.ask(client, question, **options):
        print(printable(voice.answer[shown:]), end="", flush=True)
        shown = len(voice.answer)
    print()


def _side_by_side(voices: list[ChatSide]) -> Table:
    table = Table(expand=True)
    for voice in voices:
        table.add_column(plain(voice.title))
    table.add_row(*(plain(voice.answer) for voice in voices))
    return table
