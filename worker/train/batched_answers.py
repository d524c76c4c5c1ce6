# ruff: noqa: N803 -- shape suffixes, legend in the docstring
"""Answers that pass through the model together: one row each, prompts filled up at the left.

Shapes: B = rows, L = columns of the longest row, V = vocabulary.

A row sees its own tokens alone: what fills it up is masked, and positions are counted from the row's first token. So a
row's numbers are those of the row by itself, except for the last bit or two: a product sums up in another order.
`model.generate` computes the same; it carries rows to the end whose answers are over, and knows one length and one set
of stop strings for all. Here an answer that is over leaves its row.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import psutil
import torch

from worker.train.answering import Answer
from worker.train.memory import MAY_MEAN_MEMORY, out_of_memory_code
from worker.train.sequence_state import carries_state

# Of the memory that is free, what caches may take: the rest is for activations and for the neighbours.
CACHE_SHARE: Final = 0.4
# Prompt tokens of one forward pass: bounds activations, and a CPU is no faster with more.
TOKENS_AT_ONCE: Final = {"cpu": 8_192, "cuda": 65_536}
_NEEDS: Final = ("attention_mask", "position_ids", "logits_to_keep")

Alive = Callable[[], None]


class Batch:
    """Rows of one adapter. `step` adds a token to each; answers that are over leave."""

    def __init__(self, answers: Sequence[Answer], *, pad_id: int, device: Any) -> None:
        prompts = [answer.prompt for answer in answers]
        width = max(map(len, prompts))
        ids = [[pad_id] * (width - len(prompt)) + prompt for prompt in prompts]
        self._ids = torch.tensor(ids, device=device)
        self._mask = torch.tensor(
            [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
        )
        self._rows: list[Answer] = list(answers)
        self._cache: Any = None

    @property
    def over(self) -> bool:
        return all(answer.reason is not None for answer in self._rows)

    def step(self, model: Any) -> Iterator[Answer]:
        """One more token for every row; yields the answers that are over with it."""
        positions = (self._mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -self._ids.shape[1] :]
        output = model(
            input_ids=self._ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        tokens = self._picked(output.logits[:, -1])
        going = [pair for pair in zip(self._rows, tokens, strict=True) if pair[0].reason is None]
        for answer, token in going:
            answer.add(token)
        yield from (answer for answer, _ in going if answer.reason is not None)
        self._go_on(tokens)

    def _picked(self, logits_BV: torch.Tensor) -> list[int]:
        """The next token of each row; of a row that is over, whichever."""
        if all(answer.is_greedy for answer in self._rows):
            return logits_BV.argmax(dim=-1).tolist()
        return [
            0 if answer.reason is not None else answer.pick(logits_V)
            for answer, logits_V in zip(self._rows, logits_BV, strict=True)
        ]

    def _go_on(self, tokens: Sequence[int]) -> None:
        self._ids = torch.tensor(tokens, device=self._ids.device)[:, None]
        live = [place for place, answer in enumerate(self._rows) if answer.reason is None]
        # To take rows out copies the cache: worth it once half of them are over.
        if live and 2 * len(live) <= len(self._rows):
            kept = torch.tensor(live, device=self._ids.device)
            self._rows = [self._rows[place] for place in live]
            self._ids, self._mask = self._ids[kept], self._mask[kept]
            self._cache.batch_select_indices(kept)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)


class Batcher:
    """Has answers made, as many at a time as memory takes; when it runs out, half as many from then on.

    Attributes:
        at_once: rows of a batch at the most.
    """

    def __init__(self, model: Any, *, pad_id: int, at_once: int) -> None:
        """`model`: the base, before adapters hide what it takes."""
        self._pad_id = pad_id
        together = takes_rows(model)
        self._row_bytes = _cache_bytes_per_token(model) if together else 0
        self.at_once = at_once if together else 1

    def answer(self, model: Any, answers: Sequence[Answer], *, alive: Alive = lambda: None) -> Iterator[Answer]:
        """Those of `answers` that are over, as they come; the longest prompts are asked first. `alive`: at each token.

        Raises:
            torch.OutOfMemoryError, MemoryError, RuntimeError: memory does not suffice for one alone.
        """
        waiting = sorted(answers, key=lambda answer: -(len(answer.prompt) + answer.limit))
        while waiting:
            size = self._size(model, waiting)
            over: list[Answer] = []
            try:
                for answer in self._together(model, waiting[:size], alive=alive):
                    over.append(answer)
                    yield answer
            except MAY_MEAN_MEMORY as error:
                if out_of_memory_code(error) is None or size == 1:
                    raise
                self.at_once = max(1, size // 2)
            # Outside the handler: only now are the tensors of the failed pass let go.
            waiting = [answer.begun_anew() if answer.tokens else answer for answer in waiting if answer not in over]

    def _together(self, model: Any, answers: Sequence[Answer], *, alive: Alive) -> Iterator[Answer]:
        began = time.monotonic()
        for over in self._steps(model, answers):
            for answer in over:
                answer.seconds = time.monotonic() - began
                yield answer
            alive()

    def _steps(self, model: Any, answers: Sequence[Answer]) -> Iterator[list[Answer]]:
        """After each token those that are over with it."""
        if len(answers) == 1 and self.at_once == 1:
            yield from _alone(model, answers[0])
            return
        batch = Batch(answers, pad_id=self._pad_id, device=model.device)
        while not batch.over:
            yield list(batch.step(model))

    def _size(self, model: Any, waiting: Sequence[Answer]) -> int:
        """How many of `waiting` go together. Its first is its longest."""
        prompt = len(waiting[0].prompt)
        row_bytes = self._row_bytes * (prompt + waiting[0].limit)
        by_cache = int(CACHE_SHARE * _free_bytes(model.device)) // max(1, row_bytes)
        by_prompt = TOKENS_AT_ONCE.get(model.device.type, TOKENS_AT_ONCE["cpu"]) // prompt
        return max(1, min(len(waiting), self.at_once, by_cache, by_prompt))


def _alone(model: Any, answer: Answer) -> Iterator[list[Answer]]:
    """An answer by itself, without a mask, as models need it that carry state along the sequence."""
    options = {"logits_to_keep": 1} if "logits_to_keep" in _arguments(model) else {}

    def forward(tokens: list[int], cache: Any) -> tuple[torch.Tensor, Any]:
        reads = options if cache is None else {**options, "past_key_values": cache}
        output = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=True, **reads)
        return output.logits[0, -1], getattr(output, "past_key_values", None)

    while answer.reason is None:
        for _ in answer.step(forward):
            pass
        yield [] if answer.reason is None else [answer]


def _arguments(model: Any) -> set[str]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(type(inner).forward).parameters)  # an instance's own may be wrapped


def takes_rows(model: Any) -> bool:
    """Whether rows that are filled up at the left are computed as they would be alone."""
    return set(_NEEDS) <= _arguments(model) and carries_state(model) is None


def _cache_bytes_per_token(model: Any) -> int:
    """Of keys and values, at the most: layers that look back a little keep less."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(config.num_hidden_layers) * int(heads) * int(size) * model.dtype.itemsize


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + kept
    return int(psutil.virtual_memory().available)
