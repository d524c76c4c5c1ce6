"""Placement fsdp: the frozen base is spread over the ranks; what learns stays whole on each (FSDP2).

Each decoder layer's weights lie in equal parts on the ranks and are put together for the moment of that layer's pass
(torch.distributed.fsdp.fully_shard). An adapter is a few megabytes: left out of the shards, it trains, is saved and is
resumed exactly as on one device, with any optimizer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import fully_shard

from worker.train.methods import trainable
from worker.train.parent_adapter import frozen_parameters
from worker.train.ranks import Ranks


def shard_frozen_layers(model: Any, *, ranks: Ranks, device: str) -> None:
    """Spread every decoder layer of `model` over the ranks; one layer at a time is whole on the device."""
    if ranks.world == 1:
        return
    mesh = torch.distributed.init_device_mesh(device, (ranks.world,))
    whole = set(trainable(model).values()) | frozen_parameters(model)
    for layer in decoder_layers(model):
        layer.to(device)
        fully_shard(layer, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
    model.to(device)
    # The first rank alone reads the model's state to write a checkpoint: nothing may be whole between two passes.
    fully_shard(model, mesh=mesh, ignored_params=whole, reshard_after_forward=True)


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The blocks that make up the model: the longest list of modules of one class."""
    stacks = [list(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    alike = [stack for stack in stacks if stack and len({type(block) for block in stack}) == 1]
    return max(alike, key=len)
