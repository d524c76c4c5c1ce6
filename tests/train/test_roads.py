"""The two arithmetics of a CPU, from the probe to the trained adapter, on whatever machine this is.

`ONEDNN_MAX_CPU_ISA=AVX2 make test` takes the road of a machine without bfloat16 with every test.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shared.contract.events import EXIT_DONE
from shared.contract.job_request import CreateJob
from shared.contract.spec import BaseModelRef, DataFacts
from shared.settings import Settings, trainer_environment
from shared.settle.resolve import resolve
from shared.settle.settling import DeviceFacts
from tests.patience import patience
from tests.train.tiny import FACTS, chat_rows, make_spec, read_events
from worker.host.devices import cpu

FLAGS = "flags\t: avx2 fma avx512f avx512_bf16\n"
TINY = BaseModelRef.model_validate(
    {"name": "tiny", "public_name": "example/tiny", "source": "hub", "revision": "0" * 40, "facts": FACTS}
)


@pytest.mark.parametrize(("newest", "dtype"), [("AVX2", "float32"), ("", "bfloat16")])
def test_a_job_trains_in_the_arithmetic_that_the_probe_finds(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newest: str, dtype: str
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", newest)
    (tmp_path / "cpuinfo").write_text(FLAGS)
    (found,) = cpu(Settings(home=tmp_path), cpuinfo=tmp_path / "cpuinfo")
    device = DeviceFacts("cpu", found.total_bytes, found.free_bytes, found.bfloat16)
    rows = DataFacts.model_validate({"format": "chat", "train_rows": 4, "mean_characters": 40.0, "max_characters": 60})
    job = CreateJob(model="tiny", training_file="file-a")
    settled = resolve(job, base=TINY, data=rows, device=device, seed=7).spec
    quantization = {"bnb_4bit_compute_dtype": settled.quantization.bnb_4bit_compute_dtype}
    training = {"dtype": settled.training.dtype, "num_train_epochs": 1}
    spec = make_spec(
        tmp_path,
        model=model,
        rows=chat_rows(4),
        adapter={"method": "qlora"},
        quantization=quantization,
        training=training,
    )

    done = subprocess.run(
        [sys.executable, "-m", "worker.train", str(spec), str(tmp_path / "out")],
        cwd=Path(__file__).parents[2],
        env=trainer_environment(),
        capture_output=True,
        check=False,
        timeout=patience(120),
    )

    assert settled.training.dtype == settled.quantization.bnb_4bit_compute_dtype == dtype
    assert trainer_environment().get("ONEDNN_MAX_CPU_ISA") == newest
    assert done.returncode == EXIT_DONE, done.stderr.decode()[-2000:]
    assert [event.step for event in read_events(tmp_path / "out") if event.type == "metrics"] == [1]
