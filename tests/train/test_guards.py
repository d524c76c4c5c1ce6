from __future__ import annotations

import errno
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.contract.events import EXIT_OUT_OF_MEMORY, EXIT_USER_FAULT
from shared.errors import Invalid
from shared.settings import trainer_environment
from tests.patience import patience
from tests.train.tiny import chat, chat_rows, losses, make_spec, read_events, run
from worker.train.checkpoints import Progress
from worker.train.guards import HIGH_STEPS, WATCHED_STEPS, NanLoss, check_divergence, check_numbers
from worker.train.memory import out_of_memory_code
from worker.train.objectives.objective import Loss, MicroBatch
from worker.train.objectives.supervised import SupervisedObjective
from worker.train.validation import Evaluator


def test_a_loss_that_is_no_number_ends_the_run_by_name(model: Path, tmp_path: Path) -> None:
    overflowing = shutil.copytree(model, tmp_path / "model")
    weights = load_file(overflowing / "model.safetensors")
    weights["model.norm.weight"].fill_(3e38)  # float32 ends at 3.4e38: sums of such products are inf - inf everywhere
    save_file(weights, overflowing / "model.safetensors", metadata={"format": "pt"})
    spec = make_spec(tmp_path, model=overflowing, adapter={"method": "full"})

    code, events = run(spec, tmp_path / "out")

    assert code == EXIT_USER_FAULT
    assert events[-1].code == "nan_loss"
    assert events[-1].param == "training.learning_rate"


@pytest.mark.parametrize(
    ("loss", "grad_norm", "loss_scale"),
    [(math.nan, 1.0, None), (1.0, math.inf, None), (math.nan, 1.0, 65536.0), (1.0, math.inf, 0.5)],
)
def test_numbers_that_are_none_are_refused_in_every_precision(
    loss: float, grad_norm: float, loss_scale: float | None
) -> None:
    with pytest.raises(NanLoss):
        check_numbers(loss, grad_norm, step=3, loss_scale=loss_scale)


def test_an_overflow_that_the_loss_scaler_skips_does_not_end_the_run() -> None:
    check_numbers(2.0, math.inf, step=1, loss_scale=65536.0)


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
        timeout=patience(200),
    )

    assert done.returncode == EXIT_OUT_OF_MEMORY, done.stderr.decode()[-2000:]
    assert read_events(tmp_path / "out")[-1].code == "host_oom"


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "gpu_oom"),
        (MemoryError(), "host_oom"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), "host_oom"),
        (RuntimeError("can't start new thread"), "host_oom"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "host_oom"),
        (
            torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in the docs"),
            "gpu_oom",
        ),
        (RuntimeError("CUDA driver error: out of memory"), "gpu_oom"),
        (RuntimeError("HIP error: hipErrorOutOfMemory"), "gpu_oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "gpu_oom"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "gpu_oom"),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate`"), "gpu_oom"),
        (RuntimeError("CUDA error: insufficient resources: CUSPARSE_STATUS_INSUFFICIENT_RESOURCES"), "gpu_oom"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "gpu_oom"),
        (torch.distributed.DistBackendError("NCCL error: Failed to CUDA calloc 6291456 bytes"), "gpu_oom"),
        (torch.distributed.DistBackendError("Last error: Cuda failure 2 'out of memory'"), "gpu_oom"),
        (raised_from(ValueError("the kernel failed"), RuntimeError("CUDA error: out of memory")), "gpu_oom"),
        (RuntimeError("shapes cannot be multiplied"), None),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
        (RuntimeError("out of resource: shared memory, Required: 147456, Hardware limit: 101376"), None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), None),
        (ValueError("the row says: out of memory"), None),
        (FileNotFoundError(errno.ENOENT, "no such file"), None),
    ],
)
def test_every_way_of_running_out_of_memory_is_recognised(error: BaseException, code: str | None) -> None:
    assert out_of_memory_code(error) == code


def test_memory_that_runs_out_in_any_form_ends_the_attempt_as_out_of_memory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(self: SupervisedObjective, *_: object) -> None:
        raise torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(SupervisedObjective, "loss", short)
    code, events = run(make_spec(tmp_path, model=model), tmp_path / "out")

    assert code == EXIT_OUT_OF_MEMORY
    assert (events[-1].code, events[-1].message) == ("gpu_oom", "CUDA error: out of memory")


def test_bfloat16_trains_on_a_cpu(model: Path, tmp_path: Path) -> None:
    code, events = run(
        make_spec(tmp_path, model=model, rows=chat_rows(4), training={"dtype": "bfloat16"}), tmp_path / "out"
    )

    assert code == 0, events[-1]


def test_validation_that_runs_out_of_memory_goes_on_with_fewer_rows_and_the_same_loss(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the validation shrinks: training keeps its rows a pass, and its curve."""
    settings = {"model": model, "validation": chat_rows(12), "training": {"packing": False}}
    _, before = run(make_spec(tmp_path / "roomy", **settings), tmp_path / "roomy" / "out")
    trained: list[int] = []
    whole_loss = SupervisedObjective.loss

    def narrow(objective: SupervisedObjective, network: torch.nn.Module, batch: MicroBatch) -> Loss:
        rows = len(batch.inputs["input_ids"])
        if network.training:
            trained.append(rows)
        elif rows > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole_loss(objective, network, batch)

    monkeypatch.setattr(SupervisedObjective, "loss", narrow)
    code, after = run(make_spec(tmp_path / "narrow", **settings), tmp_path / "narrow" / "out")

    assert code == 0, after[-1]
    assert set(trained) == {4}
    assert losses(after) == losses(before)
    looks = [[event.valid_loss for event in events if event.type == "validation"] for events in (before, after)]
    assert looks[0] == pytest.approx(looks[1], rel=1e-4)
    said = [event.message for event in after if event.type == "message"]
    assert said == [f"Validation ran out of memory; it goes on with {rows} rows at a time." for rows in (8, 4, 2, 1)]


def test_validation_without_memory_for_a_single_row_ends_as_out_of_memory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(self: Evaluator, *_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Evaluator, "_evaluate", none)
    code, events = run(make_spec(tmp_path, model=model, validation=chat_rows(3)), tmp_path / "out")

    assert code == EXIT_OUT_OF_MEMORY
    assert events[-1].code == "gpu_oom"
