from __future__ import annotations

import getpass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from shared.settings import Settings, trainer_environment
from worker.attempt import attempt_folder
from worker.attempt.attempt_folder import AttemptFolder
from worker.program.launcher import SPINS, environment
from worker.program.processes import Tag, own_tag


def tag() -> Tag:
    return own_tag(home=Path("/home/pool"), job_id="ftjob-1", fence=1)


def test_threads_of_a_trainer_sleep_while_they_wait_for_one_another() -> None:
    told = environment(tag=tag(), device_ids=("host:cpu",), kind="cpu", threads=3, scratch=Path("/scratch"))

    assert (told["OMP_NUM_THREADS"], told["GOMP_SPINCOUNT"]) == ("3", SPINS)


def test_what_a_host_says_of_its_network_and_its_gpus_reaches_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = {
        "NCCL_P2P_DISABLE": "1",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "FI_PROVIDER": "efa",
        "UCX_TLS": "rc",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CC": "gcc-13",
    }
    for name, value in (passed | {"AWS_SECRET_ACCESS_KEY": "x", "NCCL_AUTH_TOKEN": "x", "FI_KEY": "x"}).items():
        monkeypatch.setenv(name, value)

    told = trainer_environment()

    assert passed.items() <= told.items()
    assert {"AWS_SECRET_ACCESS_KEY", "NCCL_AUTH_TOKEN", "FI_KEY"}.isdisjoint(told)


def test_the_allocator_of_an_nvidia_gpu_grows_its_segments_unless_the_host_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)

    def told(kind: str) -> dict[str, str]:
        return environment(tag=tag(), device_ids=("host:GPU-1",), kind=kind, threads=1, scratch=Path("/scratch"))

    assert told("cuda")["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_ALLOC_CONF" not in told("cpu") | told("rocm")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False")
    assert "PYTORCH_ALLOC_CONF" not in told("cuda"), "it would win over the older name"


def test_an_operator_names_what_else_reaches_them_and_never_our_own_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"MY_FLAG": "1", "LAB_A": "2", "LAB_TOKEN": "3", "DATABASE_URL": "4", "HF_TOKEN": "5", "OTHER": "6"}
    ours = {"TUNEPOOL_SIGNING_SECRET": "7", "TUNEPOOL_TRAINER_ENV": "MY_FLAG, LAB_*,DATABASE_URL,HF_TOKEN,TUNEPOOL_*"}
    for name, value in (given | ours).items():
        monkeypatch.setenv(name, value)

    told = trainer_environment()

    assert {name: told.get(name) for name in given | ours if name in told} == {"MY_FLAG": "1", "LAB_A": "2"}
    assert Settings().trainer_env.startswith("MY_FLAG")


@pytest.mark.parametrize("names", ["*", "A B", "A=1", "A,*"])
def test_a_list_of_names_that_is_none_is_refused(names: str) -> None:
    with pytest.raises(ValidationError):
        Settings(trainer_env=names)


def test_a_trainer_has_a_name_without_an_entry_in_the_hosts_list_of_users(monkeypatch: pytest.MonkeyPatch) -> None:
    told = environment(tag=tag(), device_ids=("host:cpu",), kind="cpu", threads=3, scratch=Path("/scratch"))
    for name in ("LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("USER", told["USER"])

    assert getpass.getuser() == "trainer"


@pytest.mark.parametrize(("devices", "cores", "threads"), [(1, None, 64), (8, None, 8), (100, None, 1), (8, 3, 3)])
def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch, devices: int, cores: int | None, threads: int) -> None:
    monkeypatch.setattr(attempt_folder.os, "sched_getaffinity", lambda _pid: set(range(64)))
    one: Any = SimpleNamespace(
        device=SimpleNamespace(cores=cores),
        host=SimpleNamespace(settings=Settings(cpu_threads=None), devices=[None] * devices),
    )

    assert AttemptFolder._threads.fget(one) == threads  # type: ignore[attr-defined]
