"""Two ranks learn what one process learns: curves, answers and weights. All cases share one start of the ranks."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared.contract.events import EXIT_DONE
from tests.train.starting import ended, over_two, starter
from tests.train.test_parents import parent
from tests.train.tiny import chat, chat_rows, kto_rows, losses, make_spec, preference_rows, read_events, run

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def answered(validation: list[dict[str, Any]]) -> dict[str, Any]:
    """Learns one answer by heart, and answers the rows at every second step."""
    generate = {"max_tokens": 6, "measures": ["exact_match", "json_valid"]}
    learns = {"num_train_epochs": 6, "learning_rate": 0.01, "lr_scheduler_type": "constant", "optim": "adamw_torch"}
    return {
        "rows": [chat("who?", "me")] * 8,
        "validation": validation,
        "training": {**learns, "eval": {"steps": 2, "generate": generate}, "publish": {"by": "exact_match"}},
    }


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # 13 rows by 4: the last step of an epoch has one row for two ranks.
    "lora, packed": ("ddp", {"rows": chat_rows(13), "validation": chat_rows(5)}),
    # Three rows are answered by two ranks at each look; of the one in the next case the second rank has none.
    "answers": (
        "ddp",
        answered([chat("who?", "me"), chat("say it", "me"), chat("what?", "a row with another answer")]),
    ),
    "one answer": ("ddp", answered([chat("who?", "me")])),
    "full": ("ddp", {"adapter": {"method": "full"}, "training": {"packing": False}, "micro_batch_size": 1}),
    "qlora, recomputed": (
        "fsdp",
        {
            "rows": chat_rows(13),
            "validation": chat_rows(5),
            "adapter": {"method": "qlora"},
            "training": {"packing": False, "optim": "paged_adamw_8bit"},
            "gradient_checkpointing": True,
        },
    ),
    "preferences": (
        "ddp",
        {"rows": preference_rows(7), "data_format": "preference", "objective": {"type": "dpo"}, "micro_batch_size": 2},
    ),
    "preferences, qlora": (
        "fsdp",
        {
            "rows": preference_rows(7),
            "data_format": "preference",
            "objective": {"type": "dpo"},
            "adapter": {"method": "qlora"},
            "micro_batch_size": 1,
        },
    ),
    "kto, ddp": (
        "ddp",
        {
            "rows": kto_rows(13),
            "validation": kto_rows(5),
            "data_format": "kto",
            "objective": {"type": "kto"},
            "micro_batch_size": 2,
        },
    ),
    "kto, fsdp": (
        "fsdp",
        {
            "rows": kto_rows(7),
            "data_format": "kto",
            "objective": {"type": "kto"},
            "adapter": {"method": "qlora"},
            "micro_batch_size": 1,
        },
    ),
    # What PiSSA and OLoRA take from the base they take before it is sharded; EVA looks at the whole model.
    **{
        init: ("fsdp", {"adapter": {"method": method, "init_lora_weights": init}, "training": {"max_steps": 4}})
        for init, method in {"pissa": "lora", "olora": "lora", "eva": "lora", "loftq": "qlora"}.items()
    },
}

# Continued, a copy of the start is referred to; on top, the parent's weights are whole beside sharded layers.
GO_ON = {"continue": "ddp", "merged": "fsdp"}

FUSED = ("lora, packed", "full", "qlora, recomputed")  # the supervised ones: preferences have no fused head


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory, system_temporary_folder: Path) -> Path:
    """`alone/NAME/out` of a process and `two/NAME/out` of two ranks; those in `two/NAME, fused` took the fused head."""
    folder = tmp_path_factory.mktemp("curves")
    alone, two = folder / "alone", folder / "two"
    before = signal.getsignal(signal.SIGTERM)
    cases = CASES | gone_on(alone_run(alone / "tuned", model, {}) / "adapter")
    for name, (strategy, settings) in cases.items():
        alone_run(alone / name, model, settings)
        make_spec(two / name, model=model, **over_two(strategy, **settings))
    for name in FUSED:
        strategy, settings = cases[name]
        make_spec(two / f"{name}, fused", model=model, **over_two(strategy, **settings))
        (two / f"{name}, fused" / "fused").touch()
    signal.signal(signal.SIGTERM, before)

    first = two / next(iter(cases))
    with starter(folder, system_temporary_folder) as start:
        ranks = start(first / "spec.json", first / "out", module="tests.train.one_after_another")
        code, words = ended(ranks, seconds=500)  # a start and twenty runs
    assert code == EXIT_DONE, words
    return folder


def alone_run(folder: Path, model: Path, settings: dict[str, Any]) -> Path:
    code, events = run(make_spec(folder, model=model, **settings), folder / "out")
    assert code == EXIT_DONE, events[-1]
    return folder / "out"


def gone_on(adapter: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    case = {
        "rows": preference_rows(7),
        "data_format": "preference",
        "objective": {"type": "dpo"},
        "adapter": {"method": "qlora"},
        "micro_batch_size": 2,
    }
    return {init: (strategy, {**case, **parent(adapter, init)}) for init, strategy in GO_ON.items()}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_follow_the_curve_of_one_and_end_with_its_weights(runs: Path, name: str) -> None:
    compare(runs / "alone" / name / "out", runs / "two" / name / "out")


@pytest.mark.parametrize("init_from", GO_ON)
def test_two_ranks_go_on_from_a_tuned_model_as_one_does(runs: Path, init_from: str) -> None:
    compare(runs / "alone" / init_from / "out", runs / "two" / init_from / "out")


@pytest.mark.parametrize("name", FUSED)
def test_two_ranks_follow_the_curve_of_one_on_the_road_that_a_gpu_takes_too(runs: Path, name: str) -> None:
    """The ranks' losses come from TRL's fused head, those of the single process do not."""
    compare(runs / "alone" / name / "out", runs / "two" / f"{name}, fused" / "out")


def compare(one: Path, other: Path) -> None:
    alone, together = read_events(one), read_events(other)
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4), other
    looks = [[event.valid_loss for event in events if event.type == "validation"] for events in (alone, together)]
    assert looks[1] == pytest.approx(looks[0], rel=1e-4), other
    answers = [
        [(event.valid_answers, event.valid_exact_match) for event in events if event.type == "validation"]
        for events in (alone, together)
    ]
    assert answers[1] == answers[0], other
    assert together[-1].published_step == alone[-1].published_step, other
    assert together[-1].trained_tokens == alone[-1].trained_tokens
    assert [event.type for event in together].count("started") == 1
    (name,) = [file.name for file in (one / "adapter").glob("*model.safetensors")]
    weights = [load_file(place / "adapter" / name) for place in (one, other)]
    for tensor, theirs in weights[0].items():
        torch.testing.assert_close(weights[1][tensor], theirs, rtol=2e-2, atol=2e-3, msg=f"{other}: {tensor}")
