"""The process's random generators as a run left them: in a checkpoint, and between the turns of runs that share it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class RandomState:
    """State of torch's generators (the device's, too), numpy's and Python's. Nothing of it needs a pickle."""

    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]

    @classmethod
    def taken(cls) -> RandomState:
        """As the generators stand now."""
        tensors = {"torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["cuda"] = torch.cuda.get_rng_state()
        kind, keys, position, has_gauss, gauss = np.random.get_state()
        tensors["numpy"] = torch.from_numpy(np.asarray(keys, dtype=np.int64))
        version, words, gauss_next = random.getstate()
        facts = {
            "numpy": [str(kind), int(position), int(has_gauss), float(gauss)],
            "python": [version, list(words), gauss_next],
        }
        return cls(tensors, facts)

    def put_back(self) -> None:
        """Let every generator go on from here."""
        torch.set_rng_state(self.tensors["torch"])
        if "cuda" in self.tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.tensors["cuda"])
        kind, position, has_gauss, gauss = self.facts["numpy"]
        keys = self.tensors["numpy"].numpy().astype(np.uint32)
        np.random.set_state((kind, keys, position, has_gauss, gauss))
        version, words, gauss_next = self.facts["python"]
        random.setstate((version, tuple(words), gauss_next))
