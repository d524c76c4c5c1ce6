"""From messages to text with trained spans, through the base model's chat template.

The template is a program from a stranger: transformers renders it in a jinja sandbox, here under a time and size limit.
A span is found by rendering the conversation up to a message and checking that this is a prefix of the whole; where
`one_rendering` knows that it is, one that counts the messages does. Where a template does not have that property, its
own `{% generation %}` markers decide, or those of TRL's training template for the family; else the conversation with
other answers in an answer's place. If none is exact, the job fails: a wrong mask trains a wrong model without any sign.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import jinja2

from shared.errors import Invalid
from worker.train.answer_place import (
    behind_earlier,
    behind_header,
    parts_early,
    place_of_first,
    span_by_exchange,
    start_by_asking,
    without_closing,
)
from worker.train.arguments import for_template, wants_arguments_as_text
from worker.train.call_ids import CallIds, asked_for, with_ids
from worker.train.control_tokens import ControlTokens
from worker.train.one_rendering import MARK, with_marks
from worker.train.reasoning import key_of, under_key
from worker.train.render_time import RenderTime
from worker.train.rendering import Now, masked, rendered
from worker.train.template_faults import not_exact, template_failed, template_unusable, too_many_answers
from worker.train.time_limit import TimeIsUp, time_limit
from worker.train.token_spans import Span, runs_of
from worker.train.turn_ends import unended
from worker.train.turns import A_TOOL, ASKED, AnswerTurn, common_prefix_length, in_parts, learnt_turn
from worker.train.written import REASONING, MissingText, refuse_system_text_left_out

RENDER_SECONDS = 5.0
SLOW_ROWS = 3  # so often it may be too slow
RENDER_CHARACTERS = 16 * 1024 * 1024
# What Python raises within a template that was not written for the values it gets.
FAULTS = (TypeError, ValueError, KeyError, AttributeError, IndexError, ZeroDivisionError)
SPAN_SECONDS = 30.0  # of this thread's processor, to find the answers of one conversation by one rendering for each

JsonObject = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model reads it, and the character spans of its assistant messages, in order."""

    text: str
    spans: list[Span]


class ChatTemplate:
    """Renders conversations with one tokenizer's template."""

    def __init__(
        self, tokenizer: Any, controls: ControlTokens | None = None, *, stops: Sequence[str] = (), now: Now = None
    ) -> None:
        """`stops`: tokens that end a generation of the base model; `now`: what the template writes as the time."""
        if not tokenizer.chat_template:
            raise Invalid(
                "The base model has no chat template; give one in training.chat_template.",
                code="no_chat_template",
                param="training.chat_template",
            )
        self._tokenizer = tokenizer
        controls = controls or ControlTokens(tokenizer.backend_tokenizer, tokenizer.all_special_tokens)
        self._special_tokens = tuple(controls.ids)
        self._stops = tuple(stops)
        self._now, self._names = now, dict(tokenizer.special_tokens_map)
        self._header: str | None = None
        self._time = RenderTime(most=SLOW_ROWS)
        self._too_many: float = math.inf  # messages of a conversation whose answers could not be found in time
        self._turns: dict[str, AnswerTurn] = {}

    @property
    def ends(self) -> tuple[str, ...]:
        """Control tokens that may stand behind an answer."""
        return self._special_tokens

    @property
    def ways_to_end(self) -> tuple[str, ...]:
        """What may stand behind an answer to end its turn."""
        return self._own_turn.ways_to_end

    @property
    def end_of_turn(self) -> str:
        """What the template writes behind an answer, up to its last control token; empty where it does not tell."""
        return self._own_turn.end

    def unended(self, text: str, spans: Sequence[Span]) -> list[MissingText]:
        """What is to be known of a row whose trained answers stand in `spans` of `text`: whether all of them end."""
        return unended(text, spans, turn=self._own_turn, eos=self._tokenizer.eos_token)

    def prepared(self, messages: Sequence[JsonObject], *, before: Sequence[JsonObject] = ()) -> list[JsonObject]:
        """Messages in the form that this template expects; `before` stand before them in their conversation."""
        if any(message.get("tool_calls") for message in messages):
            messages = with_ids([*before, *messages], self.call_ids)[len(before) :]
        return [self._prepared(message) for message in messages]

    def _prepared(self, message: JsonObject) -> JsonObject:
        if message["role"] == "assistant" and not message.keys().isdisjoint(REASONING):
            message = under_key(message, self.reasoning_key)
        return for_template(message, arguments_as_text="tool_calls" in message and self.arguments_as_text)

    @functools.cached_property
    def call_ids(self) -> CallIds:
        """Which ids of calls the template takes."""
        return asked_for(self._probe)

    @functools.cached_property
    def reasoning_key(self) -> str:
        """The key under which the template reads an answer's reasoning."""
        return key_of(self._probe)

    @functools.cached_property
    def arguments_as_text(self) -> bool:
        """Whether the template takes arguments of calls as JSON text."""
        return wants_arguments_as_text(self._probe)

    def render(self, messages: list[JsonObject], *, tools: list[JsonObject] | None, prompt_only: bool = False) -> str:
        """The text of `messages`; with `prompt_only`, up to and including the assistant's header.

        Raises:
            Invalid: the template fails on these messages, takes too long or writes too much.
        """
        try:
            text = self._render(messages, tools=tools, add_generation_prompt=prompt_only)
        except jinja2.TemplateError as error:
            raise template_failed(error) from error
        header = self._own_turn.header if prompt_only and self._own_turn.unasked else ""
        return text if text.endswith(header) else text + header

    def render_with_spans(self, messages: list[JsonObject], *, tools: list[JsonObject] | None) -> Rendered:
        """The text of `messages` and where each assistant message stands in it, its end-of-turn token included."""
        return self._with_stops(self._placed(messages, tools=tools))

    def _placed(self, messages: list[JsonObject], *, tools: list[JsonObject] | None) -> Rendered:
        """The text and its answers by the first road that finds them exactly."""
        counted = self._spans_by_counting(messages, tools=tools)
        if counted is not None:
            return counted
        text = self.render(messages, tools=tools)
        spans = self._spans_by_prefix(messages, text=text, tools=tools)
        if spans is not None:
            return Rendered(text=text, spans=spans)
        marked = self._spans_by_markers(messages, tools=tools)
        if marked is not None:
            return marked
        refuse_system_text_left_out(messages, text)
        exchanged = self._spans_by_exchange(messages, text=text, tools=tools)
        if exchanged is None:
            raise not_exact()
        return Rendered(text=text, spans=exchanged)

    def _with_stops(self, rendered: Rendered) -> Rendered:
        turn = self._own_turn  # without an end a generation stops elsewhere
        return rendered if turn.end else Rendered(*turn.stopped(rendered.text, rendered.spans, self._stops))

    def prompt_within(self, whole: str, messages: list[JsonObject], *, tools: list[JsonObject] | None) -> str:
        """What `whole`, the rendering of `messages` and an answer behind them, begins with: up to the answer."""
        prompt = self.render(messages, tools=tools, prompt_only=True)
        with contextlib.suppress(jinja2.TemplateError):  # then only those that end with an answer can be rendered
            start = self._start(messages, prompt, whole, tools=tools)
            return prompt if start is None else whole[: behind_header(whole, start, self._own_turn)]
        return prompt

    def answer_behind(self, prompt: str, whole: str) -> Span:
        """Where the answer behind `prompt` stands in `whole`, its end of turn included. Raises Invalid: not there."""
        start = common_prefix_length(prompt, whole)
        if parts_early(prompt[start:], self._own_turn):
            raise not_exact()
        return start, start + len(self._without_tail(whole[start:]))

    @functools.cached_property
    def content_in_parts(self) -> bool:
        """Whether the template reads content as a list of parts only, as those of models that see pictures do."""

        def writes(messages: list[JsonObject]) -> bool:
            try:
                return str(ASKED["content"]) in self._apply(messages, tools=None)
            except jinja2.TemplateError:
                return False

        return not writes([dict(ASKED)]) and writes([in_parts(ASKED)])

    @functools.cached_property
    def _probe(self) -> Callable[..., str]:
        """Renders known messages; with a tool where the template fails without one, as Hermes 3's of tool use does."""
        try:
            self._render([dict(ASKED)], tools=None)
        except jinja2.TemplateError:
            return functools.partial(self._render, tools=[A_TOOL])
        return functools.partial(self._render, tools=None)

    def _render(self, messages: list[JsonObject], *, tools: list[JsonObject] | None, **options: Any) -> str:
        return self._apply(self._given(messages), tools=tools, **options)

    def _given(self, messages: list[JsonObject]) -> list[JsonObject]:
        return [in_parts(message) for message in messages] if self.content_in_parts else messages

    def _apply(
        self, messages: list[JsonObject], *, tools: Any, chat_template: str | None = None, **options: Any
    ) -> str:
        try:
            template = self._tokenizer.get_chat_template(chat_template, tools)
            given: JsonObject = {"tools": tools, "names": self._names, "now": self._now, **options}
            text = self._time.limited(RENDER_SECONDS, functools.partial(rendered, template, messages, **given))
        except (MemoryError, OverflowError, RecursionError) as error:
            raise template_unusable("asks for too much memory") from error
        except FAULTS as error:
            raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from error
        if len(text) > RENDER_CHARACTERS:
            raise template_unusable(f"writes more than {RENDER_CHARACTERS} characters for one conversation")
        return text

    def _spans_by_counting(self, messages: list[JsonObject], *, tools: list[JsonObject] | None) -> Rendered | None:
        """The spans of `_spans_by_prefix`, by one rendering; None where one rendering does not show them."""
        if self._counting_template is None or messages[0]["role"] == "assistant":  # a header after nothing is apart
            return None
        try:
            *parts, rest = self._render(messages, tools=tools, chat_template=self._counting_template).split(MARK)
            header = self._header_after(messages[:1], tools=tools) or self._own_turn.header
        except jinja2.TemplateError:  # will be said where prefixes are rendered
            return None
        if rest or len(parts) != len(messages):
            return None
        text, spans = "".join(parts), []
        for message, part, end in zip(messages, parts, accumulate(map(len, parts)), strict=True):
            if message["role"] != "assistant":
                continue
            if header and part.startswith(header):  # nearly always
                start = end - len(part) + len(header)
            else:
                start = end - len(part) + common_prefix_length(header, part)
                start = behind_header(text[:end], start, self._own_turn)
            spans.append((start, start + len(self._without_tail(text[start:end]))))
        return Rendered(text=text, spans=spans)

    @functools.cached_property
    def _counting_template(self) -> str | None:
        template = self._tokenizer.chat_template
        try:
            with time_limit(RENDER_SECONDS):
                return with_marks(template) if isinstance(template, str) else None  # a dict has one for tools
        except TimeIsUp:
            return None

    def _header_after(self, messages: list[JsonObject], *, tools: list[JsonObject] | None) -> str:
        """What an incremental template opens an answer with: the same after any messages."""
        if self._header is None:
            whole = self._render(messages, tools=tools, add_generation_prompt=True)
            self._header = whole[len(self._render(messages, tools=tools)) :]
        return self._header

    def _spans_by_prefix(
        self, messages: list[JsonObject], *, text: str, tools: list[JsonObject] | None
    ) -> list[Span] | None:
        spans: list[Span] = []
        until = time.thread_time() + SPAN_SECONDS
        for index, message in enumerate(messages):
            if time.thread_time() > until or len(messages) >= self._too_many:
                self._too_many = min(self._too_many, len(messages))  # or each such row would take its time
                raise too_many_answers(seconds=SPAN_SECONDS, messages=len(messages))
            if message["role"] != "assistant":
                continue
            span = self._span_of(messages, index, text=text, tools=tools)
            if span is None:
                return None
            spans.append(span)
        return spans

    def _spans_by_exchange(
        self, messages: list[JsonObject], *, text: str, tools: list[JsonObject] | None
    ) -> list[Span] | None:
        """Where the answers stand in `text`, told by rendering the conversation with others in their places."""
        until = time.thread_time() + SPAN_SECONDS
        render = functools.partial(self._render, tools=tools)
        spans: list[Span] = []
        try:
            for place in (place for place, message in enumerate(messages) if message["role"] == "assistant"):
                span = span_by_exchange(render, messages, place, text, self._own_turn)
                if span is None or time.thread_time() > until:
                    return None
                spans.append(behind_earlier(text, spans[-1], span) if spans else span)
        except jinja2.TemplateError:
            return None
        return spans

    def _span_of(
        self, messages: list[JsonObject], index: int, *, text: str, tools: list[JsonObject] | None
    ) -> Span | None:
        """Where message `index` stands in `text`, role header left out, or None if the template is not incremental."""
        try:
            if not index:
                return self._span_of_first(messages, text=text, tools=tools)
            header = self._render(messages[:index], tools=tools, add_generation_prompt=True)
            until: str | None = text
            if index + 1 < len(messages):
                until = self._render(messages[: index + 1], tools=tools, add_generation_prompt=False)
                until = without_closing(until, text, self._own_turn)
            start = None if until is None else self._start(messages[:index], header, until, tools=tools)
        except jinja2.TemplateError:
            return None
        if until is None or start is None:
            return None
        start = behind_header(until, start, self._own_turn)
        return (start, start + len(self._without_tail(until[start:])))

    def _start(
        self, before: list[JsonObject], header: str, until: str, *, tools: list[JsonObject] | None
    ) -> int | None:
        """Where the answer at the end of `until` begins; `header` is the prompt for it."""
        if until.startswith(header):
            return len(header)
        asked = self._render(before, tools=tools, add_generation_prompt=False).removesuffix(self._own_turn.closing)
        if header.startswith(asked) and until.startswith(asked):
            # A reasoning template's header may go on ("<think>") where a stored answer does not: the common part
            # is header.
            return common_prefix_length(header, until)
        return start_by_asking(functools.partial(self._render, tools=tools), before, until, self._own_turn)

    def _span_of_first(self, messages: list[JsonObject], *, text: str, tools: list[JsonObject] | None) -> Span | None:
        """Where an answer stands that nobody asked for: many templates cannot render what is before it, nothing."""
        turn = self._own_turn
        until = self._render(messages[:1], tools=tools) if len(messages) > 1 else text
        until = until.removesuffix(turn.closing)
        asked = self._render([ASKED], tools=tools)
        answered = self._render([ASKED, messages[0]], tools=tools)
        prompt = self._render([ASKED], tools=tools, add_generation_prompt=True)
        start = place_of_first(until, asked, answered, prompt, turn) if text.startswith(until) else None
        start = None if start is None else behind_header(until, start, turn)
        return None if start is None else (start, start + len(self._without_tail(until[start:])))

    def _without_tail(self, answer: str) -> str:
        """`answer` up to its end of turn: generation stops there."""
        return answer[: self._own_turn.end_of(answer)]

    @functools.cached_property
    def _own_turn(self) -> AnswerTurn:
        return self._turn(self._tokenizer.chat_template)

    def _turn(self, template: str | dict[str, str]) -> AnswerTurn:
        """How `template` writes an answer's turn, learnt once."""
        key = str(template)
        if key not in self._turns:
            options: dict[str, Any] = {} if template is self._tokenizer.chat_template else {"chat_template": template}
            render = functools.partial(self._probe, **options)
            stops = tuple(filter(None, (*self._stops, self._tokenizer.eos_token)))
            self._turns[key] = learnt_turn(render, self._special_tokens, stops)
        return self._turns[key]

    def _spans_by_markers(self, messages: list[JsonObject], *, tools: list[JsonObject] | None) -> Rendered | None:
        if self._marked_template is None:
            return None
        try:
            text = self._render(messages, tools=tools, chat_template=self._marked_template)
        except jinja2.TemplateError as error:
            raise template_failed(error) from error
        given: JsonObject = {"template": self._marked_template, "tools": tools, "now": self._now}
        write = functools.partial(masked, self._tokenizer, self._given(messages), **given)
        encoded = self._time.limited(RENDER_SECONDS, write)
        offsets = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        turn = self._turn(self._marked_template)
        spans = [turn.within(text, span) for span in runs_of(encoded["assistant_masks"], offsets)]
        answers = sum(message["role"] == "assistant" for message in messages)
        return Rendered(text=text, spans=spans) if len(spans) == answers else None

    @functools.cached_property
    def _marked_template(self) -> str | None:
        """A template of this family with `{% generation %}` markers: its own, TRL's, or None."""
        # Few templates come here, and TRL brings datasets and pandas along: 100 MB that a preflight can do without.
        from trl.chat_template_utils import get_training_chat_template, has_generation_markers

        try:
            with time_limit(RENDER_SECONDS):
                if has_generation_markers(self._tokenizer.chat_template):
                    return str(self._tokenizer.chat_template)
                return get_training_chat_template(self._tokenizer)
        except (TimeIsUp, jinja2.TemplateError, *FAULTS):  # TRL renders it, and raises ValueError where it knows none
            return None
