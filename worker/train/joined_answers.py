# ruff: noqa: N803 -- shape suffixes, legend in the docstring
"""Answers of one adapter that pass through the model together; they come and leave between tokens.

Shapes: B = rows, L = columns of the widest row's cache, H = heads, D = their size, V = vocabulary.

A newcomer reads its prompt by itself. Then its keys and values are set beside those of the others, at the right: what a
shorter row lacks at its left is masked, and positions are counted from the row's own first token. So a row's numbers
are those of the row alone, except for the last bit or two: a product sums up in another order. Where a cache is more
than the keys and values of each token, every answer keeps its own and goes by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, Final

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from shared.contract.generation import Called, Declined, Ended, Piece
from worker.train.answering import Answer, ModelRunner
from worker.train.memory import MAY_MEAN_MEMORY, out_of_memory_code

_PLAIN: Final = (DynamicLayer, DynamicSlidingWindowLayer)

AnswerEvent = Piece | Called | Ended | Declined


class JoinedAnswers:
    """The running answers of one adapter at one scale. `step` adds a token to each."""

    def __init__(self, *, together: bool) -> None:
        """`together`: whether this model takes rows that are filled up at the left."""
        self._together = together
        self._apart: list[Answer] = []  # each with a cache of its own
        self._stay_apart: set[int] = set()
        self._rows: list[Answer] = []
        self._cache: Any = None  # of `_rows`
        self._lengths: list[int] = []  # tokens of each row in it

    def __len__(self) -> int:
        return len(self._apart) + len(self._rows)

    @property
    def adapter_path(self) -> str:
        """The folder of the adapter that they speak with; empty for the base alone."""
        return next(chain(self._rows, self._apart)).adapter_path or ""

    def add(self, answer: Answer) -> None:
        self._apart.append(answer)

    def forget(self, number: int) -> None:
        """Make no more of that answer, if it is here."""
        self._apart = [answer for answer in self._apart if answer.number != number]
        self._leave(answer for answer in self._rows if answer.number == number)

    def step(self, speaker: ModelRunner) -> Iterator[AnswerEvent]:
        """One more token for every answer whose prompt is read, and one prompt of those that are not.

        A prompt holds the others up, so they do not wait for several at once.
        """
        if self._rows:
            yield from self._step_together(speaker)
        unread = next((answer for answer in self._apart if not answer.tokens), None)
        for answer in [each for each in self._apart if each.tokens or each is unread]:
            yield from self._step_apart(answer, speaker)

    def _step_apart(self, answer: Answer, speaker: ModelRunner) -> Iterator[AnswerEvent]:
        try:
            yield from answer.step(speaker.forward)
        except MAY_MEAN_MEMORY as error:
            answer.reason = "stop"  # there is no more of it
            yield failure(answer.number, error)
        if answer.reason is not None:
            self._apart.remove(answer)
        elif self._together and answer.number not in self._stay_apart and _is_plain(answer.cache):
            self._apart.remove(answer)
            self._join(answer)

    def _step_together(self, speaker: ModelRunner) -> Iterator[AnswerEvent]:
        logits_BV = self._logits(speaker)  # noqa: N806
        if logits_BV is None:
            self._part()
            return
        for answer, logits_V in zip(self._rows, logits_BV, strict=True):  # noqa: N806
            try:
                yield from answer.hear(logits_V)
            except MAY_MEAN_MEMORY as error:
                answer.reason = "stop"
                yield failure(answer.number, error)
        self._leave(answer for answer in self._rows if answer.reason is not None)

    def _logits(self, speaker: ModelRunner) -> torch.Tensor | None:
        """Of the next token of each row. None: the model failed on them together."""
        try:
            logits_BV = speaker.forward_rows([answer.last for answer in self._rows], self._lengths, self._cache)  # noqa: N806
        except MAY_MEAN_MEMORY as error:
            self._together = self._together and out_of_memory_code(error) is not None
            return None
        self._lengths = [length + 1 for length in self._lengths]
        return logits_BV

    def _part(self) -> None:
        """Each goes on by itself to its end, and reads again what the lost cache held. One alone may have room."""
        self._apart = [*self._rows, *self._apart]
        self._stay_apart |= {answer.number for answer in self._rows}
        self._rows, self._lengths, self._cache = [], [], None

    def _join(self, answer: Answer) -> None:
        cache, answer.cache = answer.cache, None
        self._rows.append(answer)
        self._lengths.append(len(answer.prompt) + answer.tokens - 1)  # the last one is not read yet
        self._rearrange(lambda: cache if self._cache is None else _side_by_side(self._cache, cache))

    def _leave(self, over: Iterable[Answer]) -> None:
        """Take rows out, with the columns that only they needed."""
        gone = {answer.number for answer in over}
        kept = [place for place, answer in enumerate(self._rows) if answer.number not in gone]
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[place] for place in kept]
        self._lengths = [self._lengths[place] for place in kept]
        self._rearrange(lambda: _chosen(self._cache, kept, width=max(self._lengths)) if kept else None)

    def _rearrange(self, arranged: Callable[[], Any]) -> None:
        """Have a cache of the rows that there are now. Without memory for it each goes on by itself."""
        failed = False
        try:
            self._cache = arranged()
        except MAY_MEAN_MEMORY:
            failed = True
        if failed:  # outside the handler: only now are its tensors let go
            self._part()


def failure(number: int, error: BaseException) -> Declined:
    """What is said of an answer on which the model fails."""
    code = out_of_memory_code(error)
    if code is None:
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
        return Declined(number=number, code="generation_failed", message=f"The model failed on this prompt: {last}")
    message = "The playground's device has no memory left for this answer. Shorten the prompt, or try again later."
    return Declined(number=number, code=code, message=message, passing=True)


# --- caches -----------------------------------------------------------------------------------------------------------


def _is_plain(cache: Any) -> bool:
    """Whether it holds keys and values of each token and nothing else, so that rows can be set side by side."""
    return type(cache) is DynamicCache and all(type(layer) in _PLAIN and layer.is_initialized for layer in cache.layers)


def _side_by_side(ours: Any, theirs: Any) -> Any:
    """One cache of both, each row at the right. Layers that look back a little hold fewer columns than the others."""
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        mine.keys, mine.values = _stacked(mine.keys, other.keys), _stacked(mine.values, other.values)
        if mine.is_sliding:
            mine.cumulative_length = max(mine.cumulative_length, other.cumulative_length)
    return ours


def _stacked(first_BHLD: torch.Tensor, second_BHLD: torch.Tensor) -> torch.Tensor:
    width = max(first_BHLD.shape[-2], second_BHLD.shape[-2])
    return torch.cat([pad(states, (0, 0, width - states.shape[-2], 0)) for states in (first_BHLD, second_BHLD)])


def _chosen(cache: Any, rows: list[int], *, width: int) -> Any:
    """These rows of a cache, with as many columns as the longest of them needs."""
    for layer in cache.layers:
        places = torch.tensor(rows, device=layer.keys.device)
        columns = min(layer.keys.shape[-2], width)
        layer.keys, layer.values = layer.keys[places, :, -columns:], layer.values[places, :, -columns:]
        if layer.is_sliding:
            layer.cumulative_length = width
    return cache
