from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shared.errors import Invalid
from shared.events import EXIT_OUT_OF_MEMORY, EXIT_USER_FAULT
from shared.settings import trainer_environment
from tests.train.tiny import chat, chat_rows, make_spec, read_events, run
from worker.train.checkpoints import Progress
from worker.train.guards import HIGH_STEPS, WATCHED_STEPS, check_divergence
from worker.train.limits import out_of_memory_code


def test_a_loss_that_is_no_number_ends_the_run_by_name(model: Path, tmp_path: Path) -> None:
    spec = make_spec(
        tmp_path,
        model=model,
        adapter={"method": "full"},
        training={
            "learning_rate": 1.0,
            "optim": "sgd",
            "max_grad_norm": 1000.0,
            "num_train_epochs": 50,
            "lr_scheduler_type": "constant",
        },
    )

    code, events = run(spec, tmp_path / "out")

    assert code == EXIT_USER_FAULT
    assert events[-1].code in ("nan_loss", "loss_diverged")
    assert events[-1].param == "training.learning_rate"


def test_a_loss_that_stays_high_ends_the_run_and_a_short_spike_does_not() -> None:
    progress = Progress()
    for _ in range(WATCHED_STEPS):
        check_divergence(2.0, progress=progress, worst=5.0)
    for _ in range(HIGH_STEPS - 1):
        check_divergence(9.0, progress=progress, worst=5.0)
    check_divergence(2.0, progress=progress, worst=5.0)
    for _ in range(HIGH_STEPS - 1):
        check_divergence(9.0, progress=progress, worst=5.0)

    with pytest.raises(Invalid) as ended:
        check_divergence(9.0, progress=progress, worst=5.0)

    assert ended.value.code == "loss_diverged"


def test_a_file_without_a_token_to_learn_is_the_users_fault(model: Path, tmp_path: Path) -> None:
    spec = make_spec(tmp_path, model=model, rows=[chat("u" * 300, "a")])

    code, events = run(spec, tmp_path / "out")

    assert code == EXIT_USER_FAULT
    assert events[-1].code == "no_trainable_tokens"


def test_memory_beyond_the_limit_ends_with_its_own_exit_code(model: Path, tmp_path: Path) -> None:
    long = [chat("u" * 200, "a" * 200)] * 64
    spec = make_spec(
        tmp_path,
        model=model,
        rows=long,
        training={"batch_size": 64, "packing": False, "max_length": 512},
        micro_batch_size=64,
        memory_limit_bytes=600_000_000,
    )

    done = subprocess.run(
        [sys.executable, "-m", "worker.train", str(spec), str(tmp_path / "out")],
        cwd=Path(__file__).parents[2],
        env=trainer_environment(),
        capture_output=True,
        check=False,
        timeout=200,
    )

    assert done.returncode == EXIT_OUT_OF_MEMORY, done.stderr.decode()[-2000:]
    assert read_events(tmp_path / "out")[-1].code == "host_oom"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "gpu_oom"),
        (MemoryError(), "host_oom"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), "host_oom"),
        (RuntimeError("shapes cannot be multiplied"), None),
    ],
)
def test_every_way_of_running_out_of_memory_is_recognised(error: BaseException, code: str | None) -> None:
    assert out_of_memory_code(error) == code


def test_float16_on_a_cpu_is_refused_with_the_remedy(model: Path, tmp_path: Path) -> None:
    code, events = run(make_spec(tmp_path, model=model, training={"dtype": "float16"}), tmp_path / "out")

    assert code == EXIT_USER_FAULT
    assert "bfloat16" in events[-1].message


def test_bfloat16_trains_on_a_cpu(model: Path, tmp_path: Path) -> None:
    code, events = run(
        make_spec(tmp_path, model=model, rows=chat_rows(4), training={"dtype": "bfloat16"}), tmp_path / "out"
    )

    assert code == 0, events[-1]
