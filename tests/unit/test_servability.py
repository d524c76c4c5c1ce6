"""Which server serves an adapter is known from its spec, before it is trained."""

from __future__ import annotations

from typing import Any

import pytest

from shared.contract.spec import Adapter
from shared.products.servability import SERVERS, published_rank, verdicts


def by_server(**adapter: Any) -> dict[str, bool | None]:
    return {verdict.server: verdict.servable for verdict in verdicts(Adapter(**adapter))}


@pytest.mark.parametrize(
    ("adapter", "vllm", "sglang", "llama_cpp"),
    [
        ({}, True, True, True),
        ({"method": "dora"}, False, False, False),
        ({"method": "qdora"}, False, False, False),
        ({"bias": "lora_only"}, False, None, False),
        ({"modules_to_save": ["lm_head"]}, False, None, False),
        ({"target_modules": "experts"}, False, False, False),
        ({"rank_pattern": {"q_proj": 4}}, False, None, True),
        ({"alpha_pattern": {"q_proj": 4}}, False, None, True),
        ({"use_rslora": True}, True, None, True),
        ({"layers_to_transform": [0, 1]}, True, True, True),
        ({"r": 512}, True, True, True),
        ({"r": 513}, False, True, True),
        ({"r": 300, "init_lora_weights": "pissa"}, False, True, True),
        ({"rank_pattern": {"q_proj": 600}}, False, None, True),
    ],
)
def test_a_server_takes_an_adapter_or_says_why_not(
    adapter: dict[str, Any], vllm: bool, sglang: bool | None, llama_cpp: bool
) -> None:
    assert by_server(**adapter) == {
        "peft": True,
        "playground": True,
        "vllm": vllm,
        "sglang": sglang,
        "llama_cpp": llama_cpp,
    }


def test_every_verdict_that_is_no_yes_has_a_reason_and_a_way_out() -> None:
    for verdict in verdicts(Adapter(method="dora", bias="all", use_rslora=True)):
        assert verdict.servable or "merge it into its base" in (verdict.reason or "")


def test_the_rank_that_vllm_must_be_started_with_is_one_that_it_takes() -> None:
    adapter = Adapter(r=24, init_lora_weights="olora")

    (vllm,) = (verdict for verdict in verdicts(adapter) if verdict.server == "vllm")

    assert published_rank(adapter) == 48
    assert vllm.reason == "Start it with --enable-lora --max-lora-rank 64."


def test_a_whole_model_is_served_as_a_model() -> None:
    found = verdicts(Adapter(method="full"))

    assert [verdict.server for verdict in found] == list(SERVERS)
    assert all(verdict.servable and "whole model" in (verdict.reason or "") for verdict in found)
