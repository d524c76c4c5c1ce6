"""Mixtures of experts: the balancing loss of their routers is off.

It keeps experts evenly used while a model is trained from scratch; some hundred steps of fine-tuning leave the base's
balance as it is. As a mean per forward pass it would change with how rows are laid out, and stand in the reported loss.
Upstream's trainer also reads a state for it that only its own loop sets.
"""

from __future__ import annotations

from typing import Any

from worker.train.reporting import Reporter


def without_router_loss(model: Any, *, reporter: Reporter) -> None:
    """Ask `model` for no router logits, and say so where it has such a loss.

    The trainers' share is `router_aux_loss_coef` in `trainer_arguments`.
    """
    configs = [config for config in (model.config, model.config.get_text_config()) if _balances(config)]
    for config in configs:
        config.output_router_logits = False
    if configs:
        reporter.say("The balancing loss of the experts' routers is off: they keep the balance that the base has.")


def _balances(config: Any) -> bool:
    return hasattr(config, "output_router_logits")
