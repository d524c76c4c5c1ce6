"""Which server can serve what a job trains. Known before training, from the spec alone.

Sources: vLLM 0.33 `vllm/lora/peft_helper.py` (refuses DoRA, biases and `modules_to_save`, reads one `r` and one
`lora_alpha` for all modules) and its issues 40005 and 41754 (expert parameters are dropped in silence); llama.cpp's
`convert_lora_to_gguf.py` (takes lora_A and lora_B alone and scales by alpha over each tensor's rank; our export
writes any other scale into lora_B); SGLang 0.5.23
(issues 25528 and 27381). None of these servers has been run against an adapter of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from shared.contract.methods import METHODS
from shared.contract.preflight_report import Server, ServerVerdict
from shared.contract.spec import Adapter

SERVERS: Final[tuple[Server, ...]] = ("peft", "playground", "vllm", "sglang", "llama_cpp")
# --max-lora-rank takes no more (vllm/config/lora.py).
VLLM_RANKS: Final = 512
MERGE: Final = "merge it into its base, and serve the merged model"


@dataclass(frozen=True, slots=True)
class _Trait:
    """A quality of an adapter, and what each server makes of it; a server that is not named takes it."""

    holds: Callable[[Adapter], bool]
    name: str
    refused_by: frozenset[Server]
    unknown_to: frozenset[Server] = frozenset()


_ALL_OTHERS: Final[frozenset[Server]] = frozenset({"vllm", "sglang", "llama_cpp"})
_TRAITS: Final = (
    _Trait(lambda it: METHODS[it.method].magnitude, "DoRA's magnitudes", frozenset({"vllm", "llama_cpp", "sglang"})),
    _Trait(lambda it: it.bias != "none", "trained biases", frozenset({"vllm", "llama_cpp"}), frozenset({"sglang"})),
    _Trait(
        lambda it: bool(it.modules_to_save), "modules_to_save", frozenset({"vllm", "llama_cpp"}), frozenset({"sglang"})
    ),
    _Trait(lambda it: it.target_modules == "experts", "adapted expert tensors", _ALL_OTHERS),
    _Trait(
        lambda it: bool(it.rank_pattern), "ranks by module (rank_pattern)", frozenset({"vllm"}), frozenset({"sglang"})
    ),
    _Trait(
        lambda it: bool(it.alpha_pattern),
        "scales by module (alpha_pattern)",
        frozenset({"vllm"}),
        frozenset({"sglang"}),
    ),
    _Trait(lambda it: it.use_rslora, "rank-stabilised scaling (use_rslora)", frozenset(), frozenset({"sglang"})),
)


def published_rank(adapter: Adapter) -> int:
    """The largest rank in the published adapter. PiSSA and OLoRA are published as a difference of twice the rank."""
    largest = max(adapter.r, *adapter.rank_pattern.values(), 0)
    return 2 * largest if adapter.init_lora_weights in {"pissa", "olora"} else largest


def verdicts(adapter: Adapter) -> list[ServerVerdict]:
    """What each server makes of an adapter of this shape, in the order of `SERVERS`.

    Of a job that goes on from a tuned model, the shape is that of what it publishes (`published_shape`).
    """
    if not METHODS[adapter.method].adapter:
        whole = "It is a whole model, not an adapter: serve its directory as a model of its own."
        return [ServerVerdict(server=server, servable=True, reason=whole) for server in SERVERS]
    return [_verdict(adapter, server) for server in SERVERS]


def _verdict(adapter: Adapter, server: Server) -> ServerVerdict:
    if server == "vllm" and published_rank(adapter) > VLLM_RANKS:
        return ServerVerdict(server=server, servable=False, reason=f"It takes ranks up to {VLLM_RANKS}; {MERGE}.")
    for servable, names in ((False, list(_refused(adapter, server))), (None, list(_unknown(adapter, server)))):
        if names:
            word = "It does not take" if servable is False else "It is not known to take"
            return ServerVerdict(server=server, servable=servable, reason=f"{word} {', '.join(names)}; {MERGE}.")
    return ServerVerdict(server=server, servable=True, reason=_needs(adapter, server))


def untaken(adapter: Adapter, server: Server) -> list[str]:
    """The traits of an adapter that a server does not take, in words."""
    return list(_refused(adapter, server))


def _refused(adapter: Adapter, server: Server) -> Iterator[str]:
    return (trait.name for trait in _TRAITS if server in trait.refused_by and trait.holds(adapter))


def _unknown(adapter: Adapter, server: Server) -> Iterator[str]:
    return (trait.name for trait in _TRAITS if server in trait.unknown_to and trait.holds(adapter))


def _needs(adapter: Adapter, server: Server) -> str | None:
    rank = published_rank(adapter)
    if server == "vllm":
        least = next(step for step in (1, 8, 16, 32, 64, 128, 256, 320, VLLM_RANKS) if step >= rank)
        return f"Start it with --enable-lora --max-lora-rank {least}."
    if server == "sglang":
        return f"Start it with --max-lora-rank {rank}, and name the adapter without a colon."
    if server == "llama_cpp":
        return "Export it (`tunepool export NAME --format gguf-lora`), and start the server with --lora."
    return None
