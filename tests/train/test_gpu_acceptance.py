"""The acceptance on a GPU runs through on a processor, with tiny sizes; on a GPU every section of it holds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.acceptance.laboratory import Check, Clock, Laboratory, farthest, near, within
from bench.gpu_acceptance import SECTIONS, main, run_section

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return Laboratory("cpu", tmp_path_factory.mktemp("laboratory"))


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return Laboratory("cuda", tmp_path_factory.mktemp("laboratory"))


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_runs_through_on_a_processor(
    processor: Laboratory, section: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SECTIONS, section, (600.0, SECTIONS[section][1]))  # its time is a GPU's

    result = run_section(section, processor)

    assert result["ok"], result
    assert result["checks"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_holds_on_a_gpu(gpu: Laboratory, section: str) -> None:
    result = run_section(section, gpu)

    assert result["ok"], result


def failing(_lab: Laboratory, _clock: Clock) -> Iterator[Check]:
    yield within("small", 1.0, 2.0)
    raise RuntimeError("CUDA error: an illegal memory access")


def test_a_section_that_fails_says_so_and_keeps_what_it_has_seen(
    processor: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SECTIONS, "machine", (10.0, failing))

    result = run_section("machine", processor)

    assert (result["ok"], result["error"]) == (False, "RuntimeError: CUDA error: an illegal memory access")
    assert [check["name"] for check in result["checks"]] == ["small"]


def test_checks_hold_within_their_bounds_only() -> None:
    assert (near("a", 1.02, 1.0, relative=0.03).ok, near("a", 1.04, 1.0, relative=0.03).ok) == (True, False)
    assert (within("a", 2.0, 2.0).ok, within("a", 2.1, 2.0).ok) == (True, False)
    assert farthest([1.0, 2.0], [1.0, 2.2]) == pytest.approx(0.0909, rel=1e-3)
    assert farthest([], [1.0]) == float("inf")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_command_says_what_to_ask(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "tunepool-server doctor" in capsys.readouterr().out
