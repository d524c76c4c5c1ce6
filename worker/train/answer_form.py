"""Answers that keep to a JSON schema: at each step, tokens that would break it are left out.

llguidance knows which tokens those are (the engine of vLLM's and SGLang's structured answers). It takes most of JSON
Schema, and says what it does not take.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from shared.errors import Invalid

# White space within the JSON: bounded, or a weak model writes nothing else.
_OPTIONS: Final = {"whitespace_pattern": r"[ \t\r\n]{0,20}"}
_TOKENIZERS_KEPT: Final = 8


class AnswerForms:
    """Makes forms for the answers of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[frozenset[int], LLTokenizer] = {}

    def of(self, schema: dict[str, Any], *, ends: Iterable[int]) -> AnswerForm:
        """The form of one answer, which `ends` may end. Raises Invalid: the schema is none that can be kept to."""
        tokens = self._tokens(frozenset(ends))
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_OPTIONS)
        wrong, faults = LLMatcher.validate_grammar_with_warnings(grammar, tokens)
        if wrong:
            raise Invalid(
                f"No answer can be made to keep to this schema: {' '.join(' '.join(faults).split())[:300]}",
                param="response_format",
                code="invalid_json_schema",
            )
        return AnswerForm(LLMatcher(tokens, grammar))

    def _tokens(self, ends: frozenset[int]) -> LLTokenizer:
        if ends not in self._known:
            if len(self._known) >= _TOKENIZERS_KEPT:
                self._known.clear()
            self._known[ends] = from_tokenizer(self._tokenizer, eos_token=sorted(ends))
        return self._known[ends]


class AnswerForm:
    """How far an answer is within its form."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self, logits_V: torch.Tensor) -> torch.Tensor:  # noqa: N803 -- V: the vocabulary
        """Logits on the CPU, without the tokens that cannot come next."""
        self._must_go_on()
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        may = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: len(logits_V)].astype(bool))
        logits_V = logits_V.float().cpu().clone()  # noqa: N806
        logits_V[: len(may)].masked_fill_(~may, float("-inf"))
        logits_V[len(may) :] = float("-inf")
        return logits_V

    def take(self, token: int) -> bool:
        """Go on with a token. Returns whether the answer is complete with it."""
        self._matcher.consume_token(token)
        self._must_go_on()
        return bool(self._matcher.is_stopped())

    def _must_go_on(self) -> None:
        if self._matcher.is_error():  # llguidance bounds what a step may cost
            raise RuntimeError(
                f"the form asked for is too intricate: {self._matcher.get_error().splitlines()[0][:200]}"
            )
