"""How ranks load a 4-bit base that they spread (placement fsdp): weight by weight, on the device, each its own part.

bitsandbytes quantises some 16 million values a second on a CPU core, and each rank would hold the whole model in the
host's memory. Here each weight is quantised on the rank's own device as it is read, and the rank keeps only the part
that `fully_shard` leaves it (torch.chunk along the first dimension, `worker/train/sharding.py`). The rest of the tensor
is address space that no page of memory stands behind.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from bitsandbytes.nn import Params4bit
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

WHOLE: Final = "bitsandbytes_4bit_by_weight"
IN_PARTS: Final = "bitsandbytes_4bit_in_parts"


def by_weight(config: BitsAndBytesConfig, *, in_parts: bool) -> BitsAndBytesConfig:
    """The same quantisation, done on this rank's device. `in_parts`: what other ranks keep is zeros here."""
    config.quant_method = IN_PARTS if in_parts else WHOLE
    return config


class _QuantizeOnDevice(Bnb4bitQuantize):
    """Upstream's operation with a way to the device and back around it."""

    def convert(self, input_dict: dict[str, Any], **context: Any) -> dict[str, Any]:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        placed = {name: _first(value).to(device) for name, value in input_dict.items()}
        quantised: dict[str, Params4bit] = super().convert(placed, **context)
        in_parts = self.hf_quantizer.in_parts
        return {name: _on_host(weight, in_parts=in_parts) for name, weight in quantised.items()}


def _first(value: Any) -> torch.Tensor:
    tensor: torch.Tensor = value[0] if isinstance(value, list) else value
    return tensor


def _on_host(weight: Params4bit, *, in_parts: bool) -> Params4bit:
    if not in_parts:
        return weight.to("cpu")
    weight.quant_state.to("cpu")
    return Params4bit(
        own_part(weight.data.as_subclass(torch.Tensor)),
        requires_grad=False,
        quant_state=weight.quant_state,
        blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
        module=weight.module,
        bnb_quantized=True,
    )


def own_part(weight: torch.Tensor) -> torch.Tensor:
    """A tensor of the shape of `weight` on the host, filled where `fully_shard` gives it to this rank, else zero.

    numpy asks for zeros by calloc(3): what nobody writes takes no memory.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    zeros = torch.from_numpy(np.zeros(weight.nbytes, dtype=np.uint8))
    whole = zeros.view(weight.dtype).view(weight.shape)
    places, parts = torch.chunk(whole, world), torch.chunk(weight, world)
    if rank < len(parts):
        places[rank].copy_(parts[rank])
    return whole


class _ByWeight(Bnb4BitHfQuantizer):
    in_parts = False

    def get_quantize_ops(self) -> _QuantizeOnDevice:
        return _QuantizeOnDevice(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # From here on it is a model of bitsandbytes as any other, and upstream asks for that name.
        self.quantization_config.quant_method = QuantizationMethod.BITS_AND_BYTES
        model.quantization_method = QuantizationMethod.BITS_AND_BYTES
        return super()._process_model_after_weight_loading(model, **kwargs)


class _InParts(_ByWeight):
    in_parts = True


register_quantizer(WHOLE)(_ByWeight)
register_quantizer(IN_PARTS)(_InParts)
