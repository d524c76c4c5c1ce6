"""Flags of other tools that say whether one item of a ShareGPT conversation is trained."""

from __future__ import annotations

import difflib
import re
from typing import Any, Final

TRUTHS: Final = ("train", "training", "trainable", "loss")  # axolotl's, others', and ms-swift's: true or false
# They are read in unlike ways, or say it by parts.
NOT_OFFERED: Final = ("mask", "loss_mask", "train_detail", "training_detail", "loss_scale", "label")
# Words that a flag of loss is made of: `ignore_loss`, `learn`, `is_trained`, `loss_weight`.
_WORDS: Final = frozenset(
    {"train", "trained", "training", "trainable", "loss", "losses", "mask", "masked", "learn", "learned"}
    | {"weight", "weights", "ignore", "ignored", "supervise", "supervised", "unmask", "unmasked", "backprop", "grad"}
)
SKIPS: Final = frozenset({"skip", "skipped", "exclude", "excluded"})  # of an item: is it read, or is it not there?
# They choose where their value is a truth; of other values they are notes.
CHOOSING: Final = (
    SKIPS
    | {"include", "included", "keep", "target", "is_target", "eval", "use", "only_last"}
    | ({"last_only", "last_turn_only", "only_last_turn"})
)
FLAGS: Final = (*TRUTHS, *NOT_OFFERED)
CALLS: Final = ("tool_calls", "function_call")  # of OpenAI's messages; an item is a call itself
# Reasoning beside an answer: Qwen and DeepSeek, OpenRouter, gpt-oss. Canonical rows have the first.
REASONING_KEYS: Final = ("reasoning_content", "reasoning", "thinking")
REASONING: Final = REASONING_KEYS[0]
# Names that reasoning has elsewhere, and that may mean something else.
LIKE_REASONING: Final = frozenset(
    {"thought", "thoughts", "think", "cot", "chain_of_thought", "rationale", "reasoning_text", "reasoning_details"}
    | {"scratchpad", "analysis", "thinking_content", "reasoning_steps"}
)
_ITEM_KEYS: Final = frozenset({"from", "value", "weight", *TRUTHS, *NOT_OFFERED, *CALLS, *REASONING_KEYS})


def unread_keys(item: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Keys of an item that nobody reads, each with the known key that it may be a slip of; null values do not count."""
    unread = sorted(key[:80] for key in item.keys() - _ITEM_KEYS if item[key] is not None)
    return [(key, _meant(key)) for key in unread]


def _meant(key: str) -> str | None:
    plain = key.strip().casefold()
    if plain in LIKE_REASONING:
        return REASONING
    near = difflib.get_close_matches(plain, sorted(_ITEM_KEYS), n=1, cutoff=0.8)
    return near[0] if near else None


def names_loss(key: str) -> bool:
    """Whether a key reads like a flag that says what is trained, in words that nobody here obeys."""
    words = re.split(r"[\W_]+|(?<=[a-z])(?=[A-Z])", key)
    return key not in _ITEM_KEYS and not _WORDS.isdisjoint(word.casefold() for word in words)


def truth_of(value: Any) -> bool | None:
    """A flag's value, which tables and some tools write as 1 and 0; None for all that is no truth."""
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def weight_of(item: dict[str, Any]) -> Any:
    """The weight that an item's flags ask for: the least of them; None where there are none."""
    given = [int(truth) for key in TRUTHS if (truth := truth_of(item.get(key))) is not None]
    weight = item.get("weight")
    if weight is None or weight in (0, 1):
        given += [] if weight is None else [weight]
        return min(given, default=None)
    return weight


def reasoning_of(item: dict[str, Any]) -> str | None:
    """The reasoning beside an answer, under whichever name; None where there is none, or two that differ."""
    named = {item[key] for key in REASONING_KEYS if isinstance(item.get(key), str) and item[key]}
    return named.pop() if len(named) == 1 else None


def asks_to_train(item: dict[str, Any]) -> str | None:
    """The first flag of an item that asks for loss on it; None where there is none."""
    return next((key for key in (*TRUTHS, "weight") if item.get(key) not in (None, False, 0)), None)
