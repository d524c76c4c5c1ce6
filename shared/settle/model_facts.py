"""A base model's facts: what sizing and placement must know before any weight is read.

Parameters are those that the headers of its weights list (shared/settle/weights.py). Linear layers and experts are
those of the model that transformers builds without memory (worker/train/description.py). Where nothing was looked up,
as for an entry of `models.toml` that states its config itself, both are computed from config.json.
"""

from __future__ import annotations

import re
from math import prod
from typing import Any, Final

from shared.contract.base_facts import MOST_LAYER_KINDS, ExpertFacts, ModelFacts
from shared.contract.families import tied_where_unsaid
from shared.contract.model_description import ModelBuild
from shared.errors import Invalid
from shared.settle.sequence_state import carried_state
from shared.settle.weights import Tensors, Weights, weigh

# Where models with several parts keep the language model's numbers (transformers' own order of looking).
_TEXT: Final = ("text_config", "llm_config", "language_config")
_LARGEST: Final = 10_000_000  # no size of any model; arithmetic with more only does harm
_MOST_LAYERS: Final = 10_000  # the deepest models have some hundred; each reading of the catalogue goes through all
_EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN: Final = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")
_BESIDE: Final = re.compile(r"(vision|audio|speech)_config")


def facts_of(config: Any, *, name: str, weights: Weights | None = None, build: ModelBuild | None = None) -> ModelFacts:
    """Facts from a transformers config.json; of the language model where it is one part of several.

    Args:
        weights: what the headers of its weights say; all parts count.
        build: the layers that transformers makes of the config.

    Raises:
        Invalid: it is no object, or lacks a number; names the key.
    """
    try:
        architecture = _architecture(config)
        return _as_built(_facts(_text_part(config), architecture=architecture, weights=weights), build)
    except (KeyError, IndexError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise Invalid(f"Model '{name}': its config.json lacks or misstates {error}.", param=f"models.{name}") from error


def _as_built(facts: ModelFacts, build: ModelBuild | None) -> ModelFacts:
    """With the layers of the build in place of a table's, and its stacks of experts in place of a formula."""
    if build is None or not 0 < len(build.linear) <= MOST_LAYER_KINDS:
        return facts
    stacked = sum(prod(kind.shape) * kind.count for kind in build.experts)
    experts = None if facts.experts is None else facts.experts.model_copy(update={"stacked": stacked})
    return facts.model_copy(update={"linear": build.linear, "experts": experts})


def weights_of(config: Any, tensors: Tensors, *, name: str) -> Weights:
    """What the tensors of a model with this config.json amount to. Raises Invalid."""
    layers = facts_of(config, name=name).num_hidden_layers
    return weigh(tensors, config=config, layers=layers)


def _architecture(config: Any) -> str:
    if not isinstance(config, dict):
        raise TypeError("everything: it is no object")
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise ValueError(f"'architectures', which is {str(named)[:40]}")
    return named[0]


def _text_part(config: dict[str, Any]) -> dict[str, Any]:
    part: dict[str, Any] = next((config[key] for key in _TEXT if isinstance(config.get(key), dict)), {})
    return {**config, **{key: value for key, value in part.items() if value is not None}}


def _facts(config: dict[str, Any], *, architecture: str, weights: Weights | None) -> ModelFacts:
    hidden = _number(config, "hidden_size", "n_embd")
    heads = _heads(config)
    layers = _layers(config)
    feed_forward = _size(config, "intermediate_size", "n_inner") or 4 * hidden
    kv_heads = _size(config, "num_key_value_heads") or heads
    head_dim = _size(config, "head_dim") or hidden // heads
    vocab, tied = _number(config, "vocab_size"), _ties(config, weights)
    attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim
    embeddings = vocab * hidden * (1 if tied else 2)
    counted = embeddings + layers * attention + _feed_forward(config, hidden, feed_forward, layers)
    return ModelFacts(
        architecture=architecture,
        parameters=_loaded(weights, tied=tied) if weights else _size(config, "num_parameters") or counted,
        active_parameters=_active(config, weights, tied=tied) if weights else None,
        expert_parameters=weights.expert_parameters if weights else None,
        stored_as=weights.dtype if weights else None,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=feed_forward,
        vocab_size=vocab,
        max_position_embeddings=_size(config, "max_position_embeddings", "n_positions") or 2048,
        tie_word_embeddings=tied,
        carries_state=carried_state(config),
        experts=_experts(config, feed_forward, layers),
        beside=_beside(config),
        quantised_as=_stored_as(config),
    )


def _number(config: dict[str, Any], name: str, older: str = "") -> int:
    value = _size(config, name, older)
    if not value:
        raise KeyError(name)
    if value > _LARGEST:
        raise ValueError(f"'{name}', which is {str(value)[:40]}")
    return value


def _size(config: dict[str, Any], *names: str) -> int:
    """As `_stated`, of what no model has fewer than 0 of."""
    value = _stated(config, *names)
    if value < 0:
        raise ValueError(f"'{names[0]}', which is {str(value)[:40]}")
    return value


def _stated(config: dict[str, Any], *names: str) -> int:
    """The number under the first of `names` that has one; 0 where none has. Raises ValueError naming the key."""
    for name in names:
        if config.get(name):
            try:
                return int(config[name])
            except (TypeError, ValueError, ArithmeticError) as error:
                raise ValueError(f"'{name}', which is {str(config[name])[:40]}") from error
    return 0


def _ties(config: dict[str, Any], weights: Weights | None) -> bool:
    """Whether embedding and output layer are one. Where the config does not say so, the stored tensors do."""
    unsaid = weights.head_parameters == 0 if weights else tied_where_unsaid(str(config.get("model_type", "")))
    return bool(config.get("tie_word_embeddings", unsaid))


def _loaded(weights: Weights, *, tied: bool) -> int:
    """All parameters, an output layer that is the embedding counted once, also where it is stored twice."""
    return weights.parameters - (weights.head_parameters if tied else 0)


def _active(config: dict[str, Any], weights: Weights, *, tied: bool) -> int | None:
    """Parameters that one token passes through; None where the config does not say how many experts are chosen."""
    total, experts = _loaded(weights, tied=tied), _stated(config, *_EXPERTS)
    if weights.expert_parameters == 0:
        return total
    chosen = _stated(config, *_CHOSEN)
    if not 0 < chosen <= experts:
        return None
    return total - weights.expert_parameters * (experts - chosen) // experts


def _layers(config: dict[str, Any]) -> int:
    """Decoder layers; Nemotron-H may list their kinds instead of counting them."""
    kinds = config.get("layers_block_type")
    listed = len(kinds) if isinstance(kinds, list) else None
    layers = _number({"num_hidden_layers": listed, **config}, "num_hidden_layers", "n_layer")
    if layers > _MOST_LAYERS:
        raise ValueError(f"'num_hidden_layers', which is {layers}")
    return layers


def _heads(config: dict[str, Any]) -> int:
    """Attention heads; 1 for a base that has no attention at all, as Mamba."""
    if carried_state(config) is not None and not (config.get("num_attention_heads") or config.get("n_head")):
        return 1
    return _number(config, "num_attention_heads", "n_head")


def _experts(config: dict[str, Any], dense: int, layers: int) -> ExpertFacts | None:
    count = _stated(config, *_EXPERTS)
    mixed = layers - _dense_layers(config, layers)
    if count <= 1 or mixed == 0:
        return None
    return ExpertFacts(layers=mixed, count=count, width=_stated(config, "moe_intermediate_size") or dense)


def _beside(config: dict[str, Any]) -> str | None:
    """The kinds of parts that stand beside the language model: "vision", "vision and audio"."""
    kinds = (match[1] for key, value in config.items() if value and (match := _BESIDE.fullmatch(key)))
    return " and ".join(sorted(kinds, reverse=True)) or None


def _stored_as(config: dict[str, Any]) -> str | None:
    stored = config.get("quantization_config")
    if not isinstance(stored, dict):
        return None
    method = stored.get("quant_method") or ("bitsandbytes" if stored.get("load_in_4bit") else "an unknown format")
    return str(method)[:40]


def _feed_forward(config: dict[str, Any], hidden: int, dense: int, layers: int) -> int:
    """Weights of all layers' feed-forward parts: three matrices each, and with experts a router per layer."""
    experts = _stated(config, *_EXPERTS)
    if experts <= 1:
        return layers * 3 * hidden * dense
    width = _stated(config, "moe_intermediate_size") or dense
    shared = _stated(config, "shared_expert_intermediate_size") or width * _stated(config, "n_shared_experts")
    plain = _dense_layers(config, layers)
    each = 3 * hidden * (experts * width + shared) + hidden * experts
    return plain * 3 * hidden * dense + (layers - plain) * each


def _dense_layers(config: dict[str, Any], layers: int) -> int:
    """How many layers have no experts, by the keys of DeepSeek, Qwen, Llama 4, Jamba and Nemotron-H."""
    kinds = config.get("layers_block_type")
    if isinstance(kinds, list) and "moe" in kinds:
        return layers - kinds.count("moe")
    first = _stated(config, "first_k_dense_replace")
    named = config.get("mlp_only_layers") or []
    if not isinstance(named, list):
        raise ValueError(f"'mlp_only_layers', which is {str(named)[:40]}")
    plain = {at for at in named if isinstance(at, int)}
    step = _stated(config, "decoder_sparse_step", "interleave_moe_layer_step") or 1
    period, offset = _stated(config, "expert_layer_period") or 1, _stated(config, "expert_layer_offset")
    return sum(at < first or at in plain or (at + 1) % step != 0 or (at - offset) % period != 0 for at in range(layers))
