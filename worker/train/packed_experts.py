"""Stacks of experts in 4 bits: bitsandbytes quantises linear modules, and the experts of a mixture are none.

Each stack is quantised as it is loaded, on the device, so that no more than one is there in 16 bits. The module gets
bitsandbytes' own parametrization: a pass expands the two stacks of the layer that it is in. Autograd keeps what was
expanded for the backward pass, so that little is gained without recomputed activations (shared/settle/sizing.py).
"""

from __future__ import annotations

from typing import Any, Final

import torch
from bitsandbytes import functional
from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from worker.train.targets import expert_stacks

WITH_EXPERTS: Final = "bitsandbytes_4bit_with_experts"


def with_experts(config: BitsAndBytesConfig) -> BitsAndBytesConfig:
    """The same quantisation, of stacks of experts too."""
    config.quant_method = WITH_EXPERTS
    return config


class _QuantizeStacks(Bnb4bitQuantize):
    """Upstream's operation for linear layers, and ours for stacks."""

    def convert(self, input_dict: dict[str, Any], **context: Any) -> dict[str, Any]:
        stacks = {name: value for name, value in input_dict.items() if name in self.hf_quantizer.stacks}
        linear = {name: value for name, value in input_dict.items() if name not in stacks}
        made = super().convert(linear, **context) if linear else {}
        return made | {name: self._packed(name, value) for name, value in stacks.items()}

    def _packed(self, name: str, value: Any) -> torch.nn.Parameter:
        config = self.hf_quantizer.quantization_config
        packed, state = functional.quantize_4bit(
            value[0] if isinstance(value, list) else value,
            quant_type=config.bnb_4bit_quant_type,
            compress_statistics=config.bnb_4bit_use_double_quant,
        )
        self.hf_quantizer.states[name] = state
        return torch.nn.Parameter(packed, requires_grad=False)


@register_quantizer(WITH_EXPERTS)
class _WithExperts(Bnb4BitHfQuantizer):
    stacks: frozenset[str] = frozenset()

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        self.stacks = frozenset(expert_stacks(model))
        self.states: dict[str, functional.QuantState] = {}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.stacks or super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> _QuantizeStacks:
        return _QuantizeStacks(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, state in self.states.items():
            path, _, parameter = name.rpartition(".")
            described = state.as_dict(packed=True)
            replace_parameter_4bit_prequantized(model.get_submodule(path), parameter, described, state.absmax.device)
        # From here on it is a model of bitsandbytes as any other, and upstream asks for that name.
        self.quantization_config.quant_method = QuantizationMethod.BITS_AND_BYTES
        model.quantization_method = QuantizationMethod.BITS_AND_BYTES
        return super()._process_model_after_weight_loading(model, **kwargs)
