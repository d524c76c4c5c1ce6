"""Two ranks over gloo on the CPU, started by the very launcher that a supervisor uses."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared.contract.events import EXIT_DONE, EXIT_OUT_OF_MEMORY, EXIT_STOPPED, EXIT_USER_FAULT
from shared.contract.spec import AttemptSpec, Placement
from shared.errors import Unavailable
from shared.operating.isolation import measured_isolation
from shared.settings import Settings
from tests import living
from tests.patience import patience
from tests.train.test_parents import parent
from tests.train.tiny import chat, chat_rows, kto_rows, losses, make_spec, preference_rows, read_events, run
from worker.program import launcher, processes
from worker.program.launcher import Meeting, Trainer
from worker.train import evaluation_rows
from worker.train.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

PATIENCE = 150.0  # for starting two interpreters with the training stack on a busy machine


@pytest.fixture
def start(tmp_path: Path, system_temporary_folder: Path) -> Iterator[Callable[..., Trainer]]:
    """Starts trainers as a supervisor would; proves them dead afterwards, and that they left nothing behind."""
    started: list[Trainer] = []
    before = set(system_temporary_folder.iterdir())

    def begin(spec_file: Path, out: Path, *, meeting: Meeting | None = None, module: str = "worker.train") -> Trainer:
        out.mkdir(exist_ok=True)
        spec = AttemptSpec.model_validate_json(spec_file.read_bytes())
        walls = measured_isolation(Settings(home=tmp_path / "home", trainer_uid=0))
        tag = processes.own_tag(home=out, job_id=spec.job_id, fence=len(started))
        trainer = launcher.start(
            launcher.command(module, placement=spec.job.placement, spec_file=spec_file, out=out, meeting=meeting),
            environment=launcher.environment(tag=tag, device_ids=("h:cpu",), kind="cpu", threads=1, scratch=out),
            tag=tag,
            out=out,
            log_file=out / "log",
            # `one_after_another` writes beside its folder.
            isolation=walls if module == "worker.train" else dataclasses.replace(walls, files="open"),
            company="ranks_here" if meeting is None else "ranks_elsewhere",
            reads=(tmp_path, Path(spec.base_model_path)),
        )
        started.append(trainer)
        return trainer

    yield begin
    for trainer in started:
        trainer.end(grace_seconds=0)
    assert set(system_temporary_folder.iterdir()) == before


def until(holds: Callable[[], Any], *, seconds: float = PATIENCE) -> Any:
    deadline = time.monotonic() + patience(seconds)
    while not (found := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def ended(trainer: Trainer) -> tuple[int, str]:
    """Exit code and last words of a trainer that ends by itself."""
    until(lambda: trainer.poll() is not None)
    exit_ = trainer.end(grace_seconds=0)
    return exit_.code, exit_.last_words


def steps_told(out: Path) -> int:
    file = out / "events.jsonl"
    return file.read_bytes().count(b'"metrics"') if file.exists() else 0


def over_two(strategy: str, **settings: Any) -> dict[str, Any]:
    return {**settings, "placement": {"strategy": strategy, "gpus": 2}}


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

FUSED = ("lora, packed", "full", "qlora, recomputed")  # the supervised ones: preferences have no fused head


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_follow_the_curve_of_one_and_end_with_its_weights(
    model: Path, tmp_path: Path, start: Callable[..., Trainer], strategy: str
) -> None:
    cases = {name: settings for name, (placed, settings) in CASES.items() if placed == strategy}
    follow_the_curve_of_one(cases, strategy=strategy, model=model, folder=tmp_path, start=start)


@pytest.mark.parametrize(("strategy", "init_from"), [("ddp", "continue"), ("fsdp", "merged")])
def test_two_ranks_go_on_from_a_tuned_model_as_one_does(
    model: Path, tmp_path: Path, start: Callable[..., Trainer], strategy: str, init_from: str
) -> None:
    """Continued, a copy of the start is referred to; on top, the parent's weights are whole beside sharded layers."""
    code, events = run(make_spec(tmp_path / "tuned", model=model), tmp_path / "tuned" / "out")
    assert code == EXIT_DONE, events[-1]
    case = {
        "rows": preference_rows(7),
        "data_format": "preference",
        "objective": {"type": "dpo"},
        "adapter": {"method": "qlora"},
        "micro_batch_size": 2,
        **parent(tmp_path / "tuned" / "out" / "adapter", init_from),
    }
    follow_the_curve_of_one({init_from: case}, strategy=strategy, model=model, folder=tmp_path, start=start)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_follow_the_curve_of_one_on_the_road_that_a_gpu_takes_too(
    model: Path, tmp_path: Path, start: Callable[..., Trainer], strategy: str
) -> None:
    """The ranks' losses come from TRL's fused head, those of the single process do not."""
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "fused").touch()
    cases = {name: CASES[name][1] for name in FUSED if CASES[name][0] == strategy}
    follow_the_curve_of_one(cases, strategy=strategy, model=model, folder=tmp_path, start=start)


def follow_the_curve_of_one(
    cases: dict[str, dict[str, Any]], *, strategy: str, model: Path, folder: Path, start: Callable[..., Trainer]
) -> None:
    alone, two = folder / "alone", folder / "two"
    for name, settings in cases.items():
        code, events = run(make_spec(alone / name, model=model, **settings), alone / name / "out")
        assert code == EXIT_DONE, events[-1]
        make_spec(two / name, model=model, **over_two(strategy, **settings))

    first = two / next(iter(cases))
    code, words = ended(start(first / "spec.json", first / "out", module="tests.train.one_after_another"))

    assert code == EXIT_DONE, words
    for name in cases:
        compare(alone / name / "out", two / name / "out")


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


def test_ranks_that_are_asked_to_stop_go_on_as_if_they_had_not(
    model: Path, tmp_path: Path, start: Callable[..., Trainer]
) -> None:
    """With dropout: each rank's own random generators are in the checkpoint."""
    settings = over_two("ddp", model=model, rows=chat_rows(40), adapter={"lora_dropout": 0.2})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert ended(start(make_spec(whole, **settings), whole / "out"))[0] == EXIT_DONE

    trainer = start(make_spec(broken, **settings), broken / "out")
    until(lambda: steps_told(broken / "out") >= 2)
    trainer.ask_to_stop()
    assert ended(trainer)[0] == EXIT_STOPPED
    stopped_at = steps_told(broken / "out")
    (broken / "out" / "stop").unlink()
    assert ended(start(broken / "spec.json", broken / "out"))[0] == EXIT_DONE

    events = read_events(broken / "out")
    assert [event.first_step for event in events if event.type == "started"] == [0, stopped_at]
    assert losses(events) == losses(read_events(whole / "out"))


@pytest.mark.parametrize(("strategy", "short"), [("fsdp", [1]), ("ddp", [0, 1])])
def test_validation_that_does_not_fit_on_a_rank_goes_on_with_fewer_rows_and_training_as_before(
    model: Path, tmp_path: Path, start: Callable[..., Trainer], strategy: str, short: list[int]
) -> None:
    """Under fsdp the other rank waits for a layer's weights when one gives up."""
    settings = {"rows": chat_rows(13), "validation": chat_rows(9), "training": {"packing": False}}
    alone = run(make_spec(tmp_path / "alone", model=model, **settings), tmp_path / "alone" / "out")[1]
    spec, out = make_spec(tmp_path, model=model, **over_two(strategy, **settings)), tmp_path / "out"
    (tmp_path / "short.json").write_text(json.dumps({"ranks": short, "training": 4, "evaluation": 2}))
    out.mkdir()
    evaluation_rows.write(out, 4)

    code, words = ended(start(spec, out, module="tests.train.short_of_memory"))

    assert code == EXIT_DONE, words
    together = read_events(out)
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)
    looks = [[(one.step, one.valid_loss) for one in events if one.type == "validation"] for events in (alone, together)]
    assert [step for step, _ in looks[1]] == [step for step, _ in looks[0]]
    assert [loss for _, loss in looks[1]] == pytest.approx([loss for _, loss in looks[0]], rel=1e-4)
    said = [event.message for event in together if event.type == "message"]
    assert said == ["Validation ran out of memory; it goes on with 2 rows at a time on each device."]
    # No step is done twice: what was trained before the first look is in a checkpoint.
    assert [event.step for event in together if event.type == "metrics"] == sorted(losses(alone))
    assert evaluation_rows.read(out) == 2


def test_a_rank_without_memory_in_training_ends_all_as_out_of_memory_and_half_the_rows_go_on(
    model: Path, tmp_path: Path, start: Callable[..., Trainer]
) -> None:
    settings = {"rows": chat_rows(16), "training": {"packing": False, "batch_size": 8}}
    alone = run(make_spec(tmp_path / "alone", model=model, **settings), tmp_path / "alone" / "out")[1]
    (tmp_path / "short.json").write_text(json.dumps({"ranks": [1], "training": 2, "evaluation": 2}))
    out = tmp_path / "out"
    narrower = over_two("ddp", **settings)

    code, words = ended(start(make_spec(tmp_path, model=model, **narrower), out, module="tests.train.short_of_memory"))
    assert code == EXIT_OUT_OF_MEMORY, words
    assert [event.code for event in read_events(out) if event.type == "failed"] == ["gpu_oom"]
    spec = make_spec(tmp_path, model=model, micro_batch_size=2, **narrower)
    assert ended(start(spec, out, module="tests.train.short_of_memory"))[0] == EXIT_DONE

    assert losses(read_events(out)) == pytest.approx(losses(alone), rel=1e-4)


def test_a_rank_that_dies_ends_all_of_them_within_seconds(
    model: Path, tmp_path: Path, start: Callable[..., Trainer]
) -> None:
    out = tmp_path / "out"
    spec = make_spec(tmp_path, model=model, **over_two("ddp", training={"num_train_epochs": 50}, rows=chat_rows(60)))
    trainer = start(spec, out)
    until(lambda: steps_told(out) >= 1)
    ranks = [child for child in living.family(trainer.pid) if "-u" in living.words(child)]
    assert len(ranks) == 2

    os.kill(ranks[1].pid, signal.SIGKILL)
    until(lambda: trainer.poll() is not None, seconds=15)

    assert trainer.poll() == -signal.SIGKILL
    trainer.end(grace_seconds=0)
    assert not any(map(living.is_alive, ranks))


def test_ranks_die_with_their_launcher(model: Path, tmp_path: Path, start: Callable[..., Trainer]) -> None:
    out = tmp_path / "out"
    spec = make_spec(tmp_path, model=model, **over_two("ddp", training={"num_train_epochs": 50}, rows=chat_rows(60)))
    trainer = start(spec, out)
    until(lambda: steps_told(out) >= 1)
    ranks = [child for child in living.family(trainer.pid) if "-u" in living.words(child)]

    os.kill(trainer.pid, signal.SIGKILL)

    assert living.await_end(ranks) == []


def test_a_users_fault_leaves_the_ranks_with_the_exit_code_and_words_of_one(
    model: Path, tmp_path: Path, start: Callable[..., Trainer]
) -> None:
    spec = make_spec(tmp_path, model=model, **over_two("ddp", rows=[chat("u" * 300, "a")]))

    code, _ = ended(start(spec, tmp_path / "out"))

    assert code == EXIT_USER_FAULT
    assert read_events(tmp_path / "out")[-1].code == "no_trainable_tokens"


def test_two_hosts_meet_where_the_first_one_listens_and_train_as_one(
    model: Path, tmp_path: Path, start: Callable[..., Trainer]
) -> None:
    """Two launchers, each with its own files as on two hosts; the first one writes, the second one only takes part."""
    settings = {"model": model, "rows": chat_rows(13), "validation": chat_rows(5)}
    _, alone = run(make_spec(tmp_path / "alone", **settings), tmp_path / "alone" / "out")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]

    gang = []
    for node in (0, 1):
        placement = {"strategy": "ddp", "gpus": 1, "nodes": 2}
        spec = make_spec(tmp_path / str(node), **settings, placement=placement)
        meeting = Meeting(name="ftjob-tiny-1", address="127.0.0.1", port=port, node=node)
        gang.append(start(spec, tmp_path / str(node) / "out", meeting=meeting))

    for trainer in gang:
        code, words = ended(trainer)
        assert code == EXIT_DONE, words
    assert losses(read_events(tmp_path / "0" / "out")) == pytest.approx(losses(alone), rel=1e-4)
    assert not (tmp_path / "1" / "out" / "adapter").exists()
    assert not (tmp_path / "1" / "out" / "events.jsonl").read_text()


def test_a_job_over_hosts_without_a_meeting_point_is_not_started() -> None:
    with pytest.raises(Unavailable, match="meeting point"):
        launcher.command(
            "worker.train",
            placement=Placement(strategy="ddp", gpus=4, nodes=2),
            spec_file=Path("spec.json"),
            out=Path("out"),
        )


def test_rows_are_dealt_to_ranks_without_loss_and_with_like_work() -> None:
    class Sized:
        def __init__(self, tokens: int) -> None:
            self.tokens = tokens

    rows: Any = [Sized(tokens) for tokens in (9, 1, 7, 3, 8, 2, 5, 4)]
    shares = [Ranks(rank=rank, world=2).share(rows) for rank in (0, 1)]

    assert sorted(row.tokens for share in shares for row in share) == [1, 2, 3, 4, 5, 7, 8, 9]
    work = [sum(row.tokens for row in share) for share in shares]
    assert abs(work[0] - work[1]) <= 4
