"""Flags of other tools that say whether one item of a ShareGPT conversation is trained."""

from __future__ import annotations

from typing import Any, Final

TRUTHS: Final = ("train", "loss")  # axolotl's and ms-swift's: true or false
NOT_OFFERED: Final = ("mask", "train_detail", "training_detail", "loss_scale")  # read in unlike ways, or by parts


def weight_of(item: dict[str, Any]) -> Any:
    """The weight that an item's flags ask for: the least of them; None where there are none."""
    given = [int(item[key]) for key in TRUTHS if isinstance(item.get(key), bool)]
    weight = item.get("weight")
    if weight is None or weight in (0, 1):
        given += [] if weight is None else [weight]
        return min(given, default=None)
    return weight


def asks_to_train(item: dict[str, Any]) -> str | None:
    """The first flag of an item that asks for loss on it; None where there is none."""
    return next((key for key in (*TRUTHS, "weight") if item.get(key) not in (None, False, 0)), None)
