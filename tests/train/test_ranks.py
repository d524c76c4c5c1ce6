"""Two ranks over gloo on the CPU, started by the very launcher that a supervisor uses."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.contract.events import EXIT_DONE, EXIT_OUT_OF_MEMORY, EXIT_STOPPED, EXIT_USER_FAULT
from shared.contract.spec import Placement
from shared.errors import Unavailable
from tests import living
from tests.train.starting import FORKED, ended, over_two, until
from tests.train.tiny import chat, chat_rows, losses, make_spec, read_events, run, steps_told
from worker.program import launcher
from worker.program.launcher import Meeting, Trainer
from worker.train import evaluation_rows
from worker.train.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def test_ranks_that_are_asked_to_stop_go_on_as_if_they_had_not(
    model: Path, tmp_path: Path, start: Callable[..., Trainer]
) -> None:
    """With dropout: each rank's own random generators are in the checkpoint."""
    settings = over_two("ddp", model=model, rows=chat_rows(40), adapter={"lora_dropout": 0.2})
    whole, broken = tmp_path / "a whole one", tmp_path / "broken"
    make_spec(whole, **settings)
    spec, out = make_spec(broken, **settings), broken / "out"
    (broken / "waits").touch()

    trainer = start(spec, out, module="tests.train.one_after_another", gang=FORKED)
    until(lambda: steps_told(out) >= 2 or trainer.poll() is not None)
    trainer.ask_to_stop()
    assert ended(trainer)[0] == EXIT_STOPPED
    stopped_at = steps_told(out)
    (out / "stop").unlink()
    assert ended(start(spec, out, gang=FORKED))[0] == EXIT_DONE

    events = read_events(out)
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

    code, words = ended(start(spec, out, module="tests.train.short_of_memory", gang=FORKED))

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

    spec = make_spec(tmp_path, model=model, **narrower)
    code, words = ended(start(spec, out, module="tests.train.short_of_memory", gang=FORKED))
    assert code == EXIT_OUT_OF_MEMORY, words
    assert [event.code for event in read_events(out) if event.type == "failed"] == ["gpu_oom"]
    spec = make_spec(tmp_path, model=model, micro_batch_size=2, **narrower)
    assert ended(start(spec, out, module="tests.train.short_of_memory", gang=FORKED))[0] == EXIT_DONE

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
