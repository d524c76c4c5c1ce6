"""From logits to tokens, and from tokens to text that may be shown. Nothing here knows a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import torch

from shared.contract.generation import ChosenToken, Sampling, TokenLogprob

# What the bytes of an unfinished character are decoded to. The longest has four bytes, so four tokens at the most.
_UNFINISHED: Final = "\ufffd"
_LONGEST_CHARACTER: Final = 4
# OpenAI's figure for what is out of the question; JSON has no infinity.
_UNLIKELY: Final = -9999.0


class Sampler:
    """Chooses tokens. The same seed and the same logits give the same tokens on one machine."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._chosen: Counter[int] = Counter()
        self._dice = torch.Generator(device="cpu")
        if sampling.seed is None:
            self._dice.seed()
        else:
            self._dice.manual_seed(sampling.seed)

    @property
    def is_greedy(self) -> bool:
        """Whether every token is the likeliest by the model's own numbers."""
        settings = self._sampling
        return settings.temperature == 0 and not (settings.presence_penalty or settings.frequency_penalty)

    def pick(self, logits_V: torch.Tensor) -> int:  # noqa: N803 -- V: the vocabulary
        """The next token, from logits of shape (V,)."""
        logits_V = self._penalised(logits_V.float().cpu())  # noqa: N806
        if self._sampling.temperature == 0:
            token = int(logits_V.argmax())
        else:
            shares_V = torch.softmax(logits_V / self._sampling.temperature, dim=-1)  # noqa: N806
            token = self._drawn(shares_V)
        self._chosen[token] += 1
        return token

    def _penalised(self, logits_V: torch.Tensor) -> torch.Tensor:  # noqa: N803
        """OpenAI's penalties: so much off for having been chosen at all, and so much for each time."""
        presence, frequency = self._sampling.presence_penalty, self._sampling.frequency_penalty
        if not self._chosen or not (presence or frequency):
            return logits_V
        tokens = torch.tensor(list(self._chosen))
        counts = torch.tensor(list(self._chosen.values()), dtype=logits_V.dtype)
        logits_V = logits_V.clone()  # noqa: N806
        logits_V[tokens] -= presence + frequency * counts
        return logits_V

    def _drawn(self, shares_V: torch.Tensor) -> int:  # noqa: N803
        """A token by chance; with top_p from the fewest likeliest that have this share together (arXiv 1904.09751)."""
        if self._sampling.top_p >= 1:
            return int(torch.multinomial(shares_V, 1, generator=self._dice))
        ordered, tokens = shares_V.sort(descending=True)
        kept = max(1, int((ordered.cumsum(0) - ordered < self._sampling.top_p).sum()))
        return int(tokens[torch.multinomial(ordered[:kept], 1, generator=self._dice)])


def chosen_token(logits_V: torch.Tensor, token: int, top: int, tokenizer: Any) -> ChosenToken:  # noqa: N803
    """How likely the model held a token, and the `top` likeliest; before temperature, penalties and top_p."""
    logs_V = torch.log_softmax(logits_V.float().cpu(), dim=-1)  # noqa: N806
    values, tokens = logs_V.topk(min(top, len(logs_V)))
    likeliest = [_logprob(tokenizer, int(other), float(value)) for other, value in zip(tokens, values, strict=True)]
    return ChosenToken(**dict(_logprob(tokenizer, token, float(logs_V[token]))), top=likeliest)


def _logprob(tokenizer: Any, token: int, value: float) -> TokenLogprob:
    text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return TokenLogprob(token=text, logprob=max(value, _UNLIKELY))


class Detokenizer:
    """Turns tokens into text as they come, whole characters only.

    A token's text depends on those before it, so a few are decoded together and what they add is given out (the way of
    Text Generation Inference).
    """

    def __init__(self, tokenizer: Any, *, hidden: frozenset[int] | None = None) -> None:
        """`hidden`: tokens that are left out; None: the tokenizer's control tokens."""
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._tokens: list[int] = []
        self._context = 0  # tokens from here on are decoded again, for what comes to depend on them
        self._shown = 0

    def push(self, token: int) -> str:
        """What became readable with this token; empty while a character is unfinished."""
        if self._hidden is not None and token in self._hidden:
            return ""
        self._tokens.append(token)
        before, now = self._decoded()
        waits = len(self._tokens) - self._shown < _LONGEST_CHARACTER and now.endswith(_UNFINISHED)
        if waits or len(now) <= len(before):
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        return now[len(before) :]

    def flush(self) -> str:
        """What is left at the end, an unfinished character as U+FFFD."""
        before, now = self._decoded()
        return now[len(before) :]

    def _decoded(self) -> tuple[str, str]:
        window = self._tokens[self._context :]
        return self._text(window[: self._shown - self._context]), self._text(window)

    def _text(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=self._hidden is None, clean_up_tokenization_spaces=False
        )
        return text


class StopStrings:
    """Lets text through up to the first stop string, which may come in several pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self._met = False

    def is_met(self) -> bool:
        """Whether one has come: the answer is over."""
        return self._met

    def push(self, text: str) -> str:
        """The text that may be shown now; text that could still become a stop string is held back."""
        self._held += text
        places = [place for place in map(self._held.find, self._stops) if place >= 0]
        if places:
            self._met = True
            shown, self._held = self._held[: min(places)], ""
            return shown
        kept = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - kept
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What was held back and became no stop string."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` could be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
