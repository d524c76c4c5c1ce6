"""A base that was quantised beforehand is the base to the last bit, and so is all that is trained on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
import torch
from safetensors.torch import load_file, save_file

from shared.contract.handover import Handover
from shared.contract.prepared import MADE, HeldBase, PrepareSpec
from shared.contract.spec import JobSpec, Quantization
from shared.settings import Settings, trainer_environment
from tests.patience import patience
from tests.train.tiny import losses, make_spec, read_events, run
from worker.chores import preparing
from worker.host import prepared_bases
from worker.host.libraries import trainer_libraries
from worker.host.prepared_bases import PreparedForm
from worker.program import spare
from worker.program.launcher import NO_WALLS
from worker.program.processes import TAG
from worker.train import prepare_base, row_leak
from worker.train.base_model import four_bit, load_frozen
from worker.train.prepare_base import NotTheSame, prepare
from worker.train.prepared import fingerprints, load_prepared
from worker.train.row_leak import rows_leak

QUANTIZATION = {"bnb_4bit_compute_dtype": "float32"}
QLORA: dict[str, Any] = {"adapter": {"method": "qlora"}, "quantization": QUANTIZATION}


@pytest.fixture(scope="module")
def prepared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in 4 bits, made by the program as the CPU lane starts it."""
    out = tmp_path_factory.mktemp("prepare")
    spec = PrepareSpec(
        base_model_path=str(model), dtype="float32", quantization=Quantization.model_validate(QUANTIZATION)
    )
    (out / "spec.json").write_text(spec.model_dump_json())
    argv = [sys.executable, "-m", "worker.train.prepare_base", str(out / "spec.json"), str(out)]
    subprocess.run(argv, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    return out / MADE


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_comes_back_to_the_last_bit(
    kind: Any, double: bool, dtype: Any, model: Path, tmp_path: Path
) -> None:
    quantization = Quantization(
        bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=dtype
    )
    prepare(PrepareSpec(base_model_path=str(model), dtype=dtype, quantization=quantization), tmp_path / "made")

    fresh = load_frozen(
        model, dtype=getattr(torch, dtype), quantization=four_bit(quantization), device="cpu", place="cpu"
    )
    back = load_prepared(tmp_path / "made", base=model, dtype=dtype)

    assert fingerprints(back) == fingerprints(fresh)
    for name, weight in fresh.named_parameters():
        assert torch.equal(weight, back.get_parameter(name)), name
    assert rows_leak(back) == rows_leak(fresh)
    assert back in row_leak._KNOWN, "the try was made when it was prepared"
    assert back.config._name_or_path == fresh.config._name_or_path
    layers = [module for module in back.modules() if type(module).__name__ == "Linear4bit"]
    assert layers
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers), "a pass in eval mode would rearrange them"


def test_a_form_that_comes_back_otherwise_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def altered(folder: Path, **how: Any) -> Any:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith("weight.absmax"))
        tensors[name] = tensors[name] ^ 1
        save_file(tensors, file, metadata={"format": "pt"})
        return load_prepared(folder, **how)

    monkeypatch.setattr(prepare_base, "load_prepared", altered)
    spec = PrepareSpec(
        base_model_path=str(model), dtype="float32", quantization=Quantization.model_validate(QUANTIZATION)
    )

    with pytest.raises(NotTheSame, match="1 tensors come back otherwise"):
        prepare(spec, tmp_path / "made")


def test_a_job_on_a_prepared_base_trains_the_same_adapter(model: Path, prepared: Path, tmp_path: Path) -> None:
    job = QLORA
    (tmp_path / "cold").mkdir()
    (tmp_path / "prepared").mkdir()

    cold = run(make_spec(tmp_path / "cold", model=model, **job), tmp_path / "cold/out")
    warm = run(
        make_spec(tmp_path / "prepared", model=model, prepared_path=str(prepared), **job), tmp_path / "prepared/out"
    )

    assert (cold[0], warm[0]) == (0, 0)
    assert losses(warm[1]) == losses(cold[1])
    assert losses(warm[1])
    same_product(tmp_path / "cold/out/adapter", tmp_path / "prepared/out/adapter")


def spare_that_holds(held: HeldBase, folder: Path) -> spare.Spare:
    """A trainer that is started ahead below `folder`, and is to load that base."""
    return spare.start(
        "worker.train",
        place=folder / "spare",
        home=folder,
        environment=lambda tag, _out: trainer_environment(**{TAG: str(tag), "CUDA_VISIBLE_DEVICES": ""}),
        uid=None,
        isolation=NO_WALLS,
        hold=lambda _folder: held,
    )


@pytest.mark.parametrize("same", [True, False])
def test_a_spare_that_holds_a_base_trains_as_one_that_loads_it(
    same: bool, model: Path, prepared: Path, tmp_path: Path
) -> None:
    """And so does one whose job has another base."""
    job = {**QLORA, "prepared_path": str(prepared)} if same else QLORA
    held = HeldBase(base_model_path=str(model), prepared_path=str(prepared), dtype="float32")
    started = spare_that_holds(held, tmp_path)
    try:
        spec = make_spec(tmp_path, model=model, **job)
        code, cold = run(spec, tmp_path / "out")
        trainer = started.hand_over(Handover(spec=str(spec), out=str(started.folder.out)), interrupt=lambda: None)
        deadline = time.monotonic() + patience(120)
        while trainer.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        ended = trainer.end(grace_seconds=0)
        warm = read_events(started.folder.out)
        assert (code, ended.code) == (0, 0), ended.last_words
        assert losses(warm) == losses(cold)
        assert losses(warm)
        same_product(tmp_path / "out/adapter", started.folder.out / "adapter")
    finally:
        started.remove()


def test_a_base_that_cannot_be_held_costs_a_spare_nothing_but_that(model: Path, tmp_path: Path) -> None:
    held = HeldBase(base_model_path=str(model), prepared_path=str(tmp_path / "gone"), dtype="float32")
    started = spare_that_holds(held, tmp_path)
    try:
        deadline = time.monotonic() + patience(120)
        while not started.ready:
            assert started.fault() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        while "the base model is not held" not in started.folder.log.read_text():  # it comes through a pipe
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        started.remove()


# --- the CPU lane's part ----------------------------------------------------------------------------------------------
@pytest.fixture
def host(tmp_path: Path) -> Any:
    settings = Settings(home=tmp_path / "home")
    settings.home.mkdir()
    return SimpleNamespace(
        settings=settings,
        work=settings.home / "work",
        flags=SimpleNamespace(draining=False, has_idle_child=lambda _children: True),
        devices=(),
        worker=SimpleNamespace(id="worker_1", host="host"),
        trainer_uid=None,
        isolation=NO_WALLS,
        catalogue=lambda: None,
    )


def missed(host: Any, model: Path) -> PreparedForm:
    spec = JobSpec.model_validate(json.loads(make_spec(host.settings.home, model=model, **QLORA).read_bytes())["job"])
    form = prepared_bases.form_of(spec, model=model, device="cpu", libraries=trainer_libraries())
    assert form is not None
    assert prepared_bases.miss(form, home=host.settings.home)
    return form


def find(host: Any, form: PreparedForm) -> Path | None:
    return prepared_bases.find(form, cache=host.settings.cache, user=host.settings.home, interrupt=lambda: None)


def test_a_form_that_was_missed_is_made_once_though_two_processes_try(host: Any, model: Path) -> None:
    form = missed(host, model)

    with structlog.testing.capture_logs() as told, ThreadPoolExecutor(2) as threads:
        list(threads.map(preparing.prepare_missed, [host, host]))

    assert [entry["event"] for entry in told if entry["event"].startswith("prepared_base")] == ["prepared_base.made"]
    made = find(host, form)
    assert made is not None
    fresh = load_frozen(
        model, dtype=torch.float32, quantization=four_bit(form.spec.quantization), device="cpu", place="cpu"
    )
    assert fingerprints(load_prepared(made, base=model, dtype="float32")) == fingerprints(fresh)
    assert prepared_bases.missed(host.settings.home) == []
    assert not any(host.work.rglob("*"))


def test_a_form_whose_program_fails_is_given_up_with_a_word(host: Any, model: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"no weights")
    form = missed(host, broken)

    with structlog.testing.capture_logs() as told:
        preparing.prepare_missed(host)

    assert [entry["event"] for entry in told if entry["event"].startswith("prepared_base")] == [
        "prepared_base.not_made"
    ]
    assert find(host, form) is None
    assert not prepared_bases.miss(form, home=host.settings.home)


def test_a_form_of_a_base_that_has_changed_since_is_not_kept(host: Any, model: Path, tmp_path: Path) -> None:
    """The key says what the base was."""
    base = Path(shutil.copytree(model, tmp_path / "base"))
    form = missed(host, base)
    (base / "config.json").write_bytes((base / "config.json").read_bytes() + b"\n")

    preparing.prepare_missed(host)

    assert find(host, form) is None


def test_who_is_the_last_that_could_do_short_work_makes_nothing(host: Any, model: Path) -> None:
    form = missed(host, model)
    host.flags.has_idle_child = lambda children: children < 0

    preparing.prepare_missed(host)

    assert prepared_bases.missed(host.settings.home) == [form]


def test_a_worker_that_drains_makes_nothing_and_forgets_nothing(host: Any, model: Path) -> None:
    form = missed(host, model)
    host.flags.draining = True

    preparing.prepare_missed(host)

    assert prepared_bases.missed(host.settings.home) == [form]
    assert find(host, form) is None


def same_product(one: Path, other: Path) -> None:
    first, second = load_file(one / "adapter_model.safetensors"), load_file(other / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert config_of(one) == config_of(other)


def config_of(adapter: Path) -> dict[str, Any]:
    """The names of its layers are a set of PEFT's, in another order in each process."""
    told: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    return {**told, "target_modules": sorted(told["target_modules"])}
