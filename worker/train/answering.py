"""One model that answers several questions at a time, token by token in turn.

Here an answer has a cache of its own and passes through the model by itself. Answers with the same adapter go through
the model together, where it can (`worker/train/joined_answers.py`), and so do those that are all asked at once
(`worker/train/batched_answers.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any, Final

import torch

from shared.contract.generation import Called, ChosenToken, Ended, FinishReason, Piece, Question, ToolCall
from shared.errors import Invalid
from worker.train.answer_form import AnswerForm, AnswerForms
from worker.train.answer_text import Detokenizer, Sampler, StopStrings, chosen_token
from worker.train.call_format import CallFormat, CallReader, learnt_format
from worker.train.chat import ChatTemplate
from worker.train.rendering import Now
from worker.train.written import lost

_TEMPLATES_KEPT: Final = 64

Forward = Callable[[list[int], Any], tuple[torch.Tensor, Any]]


class Prompts:
    """Turns questions into tokens as training did: messages by the chat template, a text with its begin token."""

    def __init__(self, tokenizer: Any, *, ends: Collection[int], now: Now = None) -> None:
        """`now`: what templates write as the time."""
        self._tokenizer = tokenizer
        self._now = now
        self._own_template = tokenizer.chat_template
        # What a tokenizer.json may say of cutting and padding is undone here, as for training rows.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        self._ends = frozenset(ends)
        self._templates: dict[str | None, ChatTemplate] = {}
        self._call_formats: dict[str | None, CallFormat | None] = {}

    def tokens(self, question: Question) -> list[int]:
        """The prompt of a question. Raises Invalid when the template fails on its messages, or nothing is left."""
        if question.messages is None:
            tokens = self._of_text(question.text or "")
        else:
            template = self._template(question.chat_template)
            messages = template.prepared(question.messages)
            text = template.render(messages, tools=question.tools, prompt_only=True)
            _refuse_lost_tools(messages, question, text)
            tokens = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if not tokens:
            raise Invalid("The prompt is empty; write something to go on from.", param="prompt")
        return tokens

    def ends(self, question: Question) -> tuple[frozenset[int], list[str]]:
        """What ends an answer: tokens, and texts where the template's end of turn is no control token."""
        if question.messages is None:
            return self._ends, []
        template = self._template(question.chat_template)
        end = template.end_of_turn.strip()
        first = next((token for token in template.ends if end.startswith(token)), None)
        if first is not None:  # of two, the turn ends with the second: Command R7B closes the response before
            last = next((token for token in template.ends if end.endswith(token)), first)
            return self._ends | {self._tokenizer.convert_tokens_to_ids(last)}, []
        return self._ends, [end] if end else []

    def call_reader(self, question: Question) -> CallReader | None:
        """What tells calls apart from an answer's text; None where none are offered.

        Raises:
            Invalid: `unsupported_parameter`, the template writes no calls, or in a way that is not read.
        """
        if not question.read_calls or not question.tools:
            return None
        template = self._template(question.chat_template)
        if question.chat_template not in self._call_formats:
            self._call_formats[question.chat_template] = learnt_format(template)
        form = self._call_formats[question.chat_template]
        if form is None:
            raise Invalid(
                "The chat template of this model writes no calls of tools, or in a form that is not read here. Leave "
                "'tools' out, or describe them in a message.",
                param="tools",
                code="unsupported_parameter",
            )
        return CallReader(form, {tool["function"]["name"] for tool in question.tools})

    def hidden(self, question: Question) -> frozenset[int] | None:
        """Control tokens that are no text of an answer; None: all. Those that calls are written with are read."""
        form = self._call_formats.get(question.chat_template) if question.read_calls and question.tools else None
        if form is None:
            return None
        controls = [token for token in self._template(question.chat_template).ends if token not in form.written]
        return frozenset(self._tokenizer.convert_tokens_to_ids(controls))

    def _template(self, text: str | None) -> ChatTemplate:
        self._tokenizer.chat_template = text or self._own_template
        if text not in self._templates:
            if len(self._templates) > _TEMPLATES_KEPT:
                self._templates.clear()
            self._templates[text] = ChatTemplate(self._tokenizer, now=self._now)
        return self._templates[text]

    def _of_text(self, text: str) -> list[int]:
        tokens = list(self._tokenizer(text)["input_ids"])
        if len(tokens) > 1 and tokens[-1] in self._ends:  # an end that the tokenizer adds by itself
            written = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
            if not written or written[-1] != tokens[-1]:
                tokens.pop()
        return tokens


class Answer:
    """An answer in the making. `step` adds a token; the answer has ended once `reason` is set."""

    def __init__(
        self,
        question: Question,
        *,
        prompt: list[int],
        ends: Collection[int],
        stops: list[str],
        limit: int,
        tokenizer: Any,
        form: AnswerForm | None = None,
        reader: CallReader | None = None,
        hidden: frozenset[int] | None = None,
    ) -> None:
        """`form`: kept to; `reader`: of calls; `hidden`: control tokens that are no text, all of them for None."""
        self.number = question.number
        self.adapter = question.adapter
        self.adapter_path = question.adapter_path
        self.scale = question.scale
        self.prompt = prompt
        self.limit = limit
        self.reason: FinishReason | None = None
        self.tokens = 0
        self.seconds: float | None = None  # from its beginning to its end, where somebody measures it
        self.cache: Any = None  # of an answer that goes by itself; empty, it reads everything again
        self._question, self._tokenizer, self._stop_texts = question, tokenizer, stops
        self._chosen: list[int] = []
        self._unshown: list[ChosenToken] = []  # their text is held back
        self._ends = frozenset(ends)
        self._pieces: list[str] = []
        self._sampler = Sampler(question.sampling)
        self._form, self._reader = form, reader
        self._calls: list[ToolCall] = []
        self._detokenizer = Detokenizer(tokenizer, hidden=hidden)
        self._stops = StopStrings([*question.sampling.stop, *stops])

    @property
    def text(self) -> str:
        """What may be shown so far."""
        return "".join(self._pieces)

    @property
    def is_greedy(self) -> bool:
        """Whether the next token is the likeliest, whatever was chosen before."""
        plain = self._question.sampling.top_logprobs is None and self._form is None
        return plain and self._sampler.is_greedy

    @property
    def last(self) -> int:
        """The token that was chosen last."""
        return self._chosen[-1]

    def begun_anew(self) -> Answer:
        """The same answer with no token of it made."""
        return Answer(
            self._question,
            prompt=self.prompt,
            ends=self._ends,
            stops=self._stop_texts,
            limit=self.limit,
            tokenizer=self._tokenizer,
        )

    def pick(self, logits: torch.Tensor) -> int:
        """The next token, from logits of shape (V,)."""
        return self._sampler.pick(logits if self._form is None else self._form.allowed(logits))

    def step(self, forward: Forward) -> Iterator[Piece | Called | Ended]:
        """Choose the next token; what it adds to the text, and the end if it is the last."""
        fresh = [*self.prompt, *self._chosen] if self.cache is None else [self.last]
        logits, self.cache = forward(fresh, self.cache)
        yield from self.hear(logits)

    def hear(self, logits: torch.Tensor) -> Iterator[Piece | Called | Ended]:
        """Choose the next token from logits of shape (V,); what it adds to the text, and the end if it is the last."""
        token = self.pick(logits)
        self._chosen.append(token)
        text = self.add(token)
        if self._question.sampling.top_logprobs is not None and token not in self._ends:
            self._unshown.append(chosen_token(logits, token, self._question.sampling.top_logprobs, self._tokenizer))
        if text:
            logprobs, self._unshown = self._unshown or None, []
            yield Piece(number=self.number, text=text, logprobs=logprobs)
        if self._calls:
            yield Called(number=self.number, calls=self._calls)
        if self.reason is not None:
            self.cache = None
            yield Ended(number=self.number, finish_reason=self.reason, completion_tokens=self.tokens)

    def add(self, token: int) -> str:
        """Take a token that was picked; the text that may be shown now. `reason` is set when it is the last."""
        self.tokens += 1
        text = "" if token in self._ends else self._stops.push(self._detokenizer.push(token))
        complete = self._form is not None and self._form.take(token)
        if self._stops.is_met() or token in self._ends or complete:
            self.reason = "stop"
        elif self.tokens >= self.limit:
            self.reason = "length"
        if self.reason is not None and not self._stops.is_met():
            text += self._stops.push(self._detokenizer.flush())
            if self._stops.is_met():
                self.reason = "stop"
            text += self._stops.flush()
        text = self._without_calls(text)
        self._pieces.append(text)
        return text

    def _without_calls(self, text: str) -> str:
        if self._reader is None:
            return text
        text = self._reader.push(text)
        if self.reason is None:
            return text
        rest, self._calls = self._reader.finish()
        if self._calls:
            self.reason = "tool_calls"
        return text + rest


class ModelRunner:
    """The model's side: prompts in, logits out."""

    def __init__(self, model: Any, tokenizer: Any, *, answer_tokens: int, context_tokens: int, now: Now = None) -> None:
        """`now`: what chat templates write as the time."""
        self._model = model
        self._tokenizer = tokenizer
        self._answer_tokens = answer_tokens
        self._context = min(context_tokens, _context_of(model) or context_tokens)
        self._last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._prompts = Prompts(tokenizer, ends=_end_tokens(model, tokenizer), now=now)
        self._forms = AnswerForms(tokenizer)

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer together, at the most."""
        return self._context

    def use(self, model: Any) -> None:
        """Speak through `model`, the same one with adapters around it."""
        self._model = model

    def begin(self, question: Question) -> tuple[Answer, int]:
        """The answer to a question, not a token of it made, and how many tokens its prompt has.

        Raises:
            Invalid: the template fails on the messages; `context_length_exceeded`, nothing fits behind the prompt.
        """
        prompt = self._prompts.tokens(question)
        room = self._context - len(prompt)
        wanted = question.sampling.max_tokens
        if room < (wanted or 1):
            raise Invalid(self._too_long(len(prompt), wanted), param=_field(question), code="context_length_exceeded")
        reader = self._prompts.call_reader(question)
        ends, stops = self._prompts.ends(question)
        schema = question.answer_schema
        answer = Answer(
            question,
            prompt=prompt,
            ends=ends,
            stops=stops,
            limit=wanted or min(room, self._answer_tokens),
            tokenizer=self._tokenizer,
            form=None if schema is None else self._forms.of(schema, ends=ends),
            reader=reader,
            hidden=self._prompts.hidden(question),
        )
        return answer, len(prompt)

    def _too_long(self, prompt: int, wanted: int | None) -> str:
        asked = "" if wanted is None else f" and {wanted} are asked for in the answer"
        return (
            f"This model's context has {self._context} tokens here; the prompt has {prompt}{asked}. "
            "Shorten the prompt or lower max_completion_tokens."
        )

    @torch.inference_mode()
    def forward(self, tokens: list[int], cache: Any) -> tuple[torch.Tensor, Any]:
        """Logits (V,) behind the last token, and the cache with all of them; None from a model that keeps none."""
        ids = torch.tensor([tokens], device=self._model.device)
        options = {"logits_to_keep": 1} if self._last_only else {}
        if cache is not None:
            options["past_key_values"] = cache
        output = self._model(input_ids=ids, use_cache=True, **options)
        return output.logits[0, -1], getattr(output, "past_key_values", None)

    @torch.inference_mode()
    def forward_rows(self, last: list[int], lengths: list[int], cache: Any) -> torch.Tensor:
        """Logits (B, V) behind the last token of each row; the cache, with `lengths` tokens a row, takes it up."""
        device = self._model.device
        rows = torch.tensor(lengths, device=device)[:, None]
        width = max(lengths)
        mask = None  # of rows of one length: what is computed without one is also what a row computes alone
        if min(lengths) < width:
            mask = (torch.arange(width + 1, device=device) >= width - rows).long()
        output = self._model(
            input_ids=torch.tensor(last, device=device)[:, None],
            attention_mask=mask,
            position_ids=rows,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV: torch.Tensor = output.logits[:, -1]  # noqa: N806 -- rows, vocabulary
        return logits_BV


def _refuse_lost_tools(messages: list[dict[str, Any]], question: Question, text: str) -> None:
    """Raises Invalid where the template leaves out tools, calls or results: the answer would ignore them."""
    if not question.read_calls:
        return
    for loss in lost(messages, tools=question.tools, text=text, spans=None):
        message = None if loss.message is None else messages[loss.message]
        if message is None or message.get("tool_calls") or message["role"] == "tool":
            raise Invalid(
                f"The chat template of this model leaves {loss.what} out, so its answer would not heed it.",
                param="tools" if message is None else f"messages.{loss.message}",
                code="unsupported_parameter",
            )


_CONTEXT_NAMES: Final = ("max_position_embeddings", "n_positions", "max_seq_len")


def _context_of(model: Any) -> int | None:
    config = model.config.get_text_config()
    return next((size for name in _CONTEXT_NAMES if isinstance(size := getattr(config, name, None), int)), None)


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends a text: as the model's own settings for generation say, and the tokenizer."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = set(named if isinstance(named, list) else [named])
    return {token for token in {*ends, tokenizer.eos_token_id} if token is not None}


def _field(question: Question) -> str:
    return "prompt" if question.messages is None else "messages"
