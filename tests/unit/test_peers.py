"""The bench of other trainers asks each for the same, and reads what each leaves (bench/peers.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.peers import PEERS, NotHere, Result, Side, command, document, last_words, lines, needed, specs_of, task_of
from bench.recipes import llama_factory
from shared.contract.spec import AttemptSpec

OURS = Result(
    Side("Tunepool", "lora", "bfloat16"), tokens=1000, seconds=2.0, peak_bytes=2**30, processor=20.2, loss=0.25
)
THEIRS = Result(Side("TRL", "lora", "float32"), tokens=1000, seconds=4.0, peak_bytes=2**31, loss=0.26)
FASTER = Result(Side("TRL", "lora", "bfloat16"), tokens=1000, seconds=1.0, peak_bytes=2**31)
AWAY = Result(Side("unsloth", "lora", "float32"), reason="does not install: no GPU")


def test_ratios_are_to_our_trainer_with_the_same_method_and_say_where_we_lose() -> None:
    assert lines([OURS, THEIRS, FASTER, AWAY]) == [
        ("Tunepool", "lora", "bfloat16", "500", "", "20", "1.00 GiB", "0.2500"),
        ("TRL", "lora", "float32", "250", "2.00x", "0", "2.00 GiB", "0.2600"),
        ("TRL", "lora", "bfloat16", "1000", "0.50x", "0", "2.00 GiB", ""),
        ("unsloth", "lora", "float32", "does not install: no GPU", "", "", "", ""),
    ]


def test_results_are_written_without_the_folders_of_this_run() -> None:
    assert json.loads(json.dumps(document(THEIRS)))["rate"] == 250.0
    assert "adapter" not in document(THEIRS)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("collecting\nERROR: No matching distribution found for torch==9\n", "No matching distribution"),
        ("Traceback (most recent call last):\n  File x\nNotImplementedError: no GPU\n", "NotImplementedError: no GPU"),
        ("Traceback:\nModuleNotFoundError: No module named 'x'\nbye\n", "No module named 'x'"),
        ("only this\n", "only this"),
        ("", "it said nothing"),
    ],
)
def test_a_peer_that_fails_is_told_with_its_last_error(output: str, said: str) -> None:
    assert said in last_words(output)


def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(NotHere, match="RuntimeError: no"):
        command(["python3", "-c", "raise RuntimeError('no')"])


def test_requirements_of_extras_and_those_left_out_are_not_installed() -> None:
    asked = ["torch>=2.4.0", "torchvision>=0.19.0", "Gradio<5,>=4", "trl<1,>=0.18", "deepspeed; extra == 'deepspeed'"]

    assert needed(asked, without=frozenset({"torch", "torchvision", "gradio"})) == ["trl<1,>=0.18"]


def test_every_side_gets_the_same_rows_rank_batch_and_rate(tmp_path: Path) -> None:
    specs = specs_of(tmp_path, ("qlora", "lora"), base=tmp_path, steps=4, dtype="float32")
    read = {method: AttemptSpec.model_validate_json(file.read_bytes()) for method, file in specs.items()}
    tasks = [
        task_of(read[method], Side(peer.name, method, dtype), out=tmp_path)
        for peer in PEERS
        for method, dtype in peer.sides
    ]

    assert {spec.job.data.train_rows for spec in read.values()} == {20}
    assert {(task["r"], task["lora_alpha"], task["batch"], task["learning_rate"]) for task in tasks} == {
        (16, 16, 5, 1e-3)
    }
    assert {len(Path(task["rows"]).read_bytes().splitlines()) for task in tasks} == {20}
    assert {(task["method"], task["dtype"]) for task in tasks} == {
        (method, dtype) for method in ("lora", "qlora") for dtype in ("float32", "bfloat16")
    }
    assert read["lora"].job.quantization.load_in_4bit is False
    assert read["qlora"].job.quantization.load_in_4bit is True


@pytest.mark.parametrize(("method", "bits"), [("lora", None), ("qlora", 4)])
def test_llama_factory_is_told_the_task_in_its_own_words(tmp_path: Path, method: str, bits: int | None) -> None:
    base = tmp_path / "models"
    base.mkdir()
    (base / "config.json").write_text('{"dtype": "bfloat16", "hidden_size": 8}')
    (base / "model.safetensors").write_bytes(b"weights")
    rows = tmp_path / "train.jsonl"
    rows.write_text('{"messages": []}\n')
    out = tmp_path / "out"
    out.mkdir()
    task = {
        "base": str(base),
        "rows": str(rows),
        "out": str(out),
        "method": method,
        "dtype": "float32",
        "r": 16,
        "lora_alpha": 16,
        "learning_rate": 1e-3,
        "batch": 5,
        "warmup_steps": 1,
        "max_length": 512,
        "seed": 7,
        "threads": 2,
    }

    told = json.loads(llama_factory.write(task, out).read_text())

    assert (told["lora_rank"], told["per_device_train_batch_size"], told["bf16"], told["use_cpu"]) == (
        *(16, 5, False),
        True,
    )
    assert told.get("quantization_bit") == bits
    copied = Path(told["model_name_or_path"])
    assert json.loads((copied / "config.json").read_text()) == {
        "dtype": "float32",
        "torch_dtype": "float32",
        "hidden_size": 8,
    }
    assert (copied / "model.safetensors").read_bytes() == b"weights"
    assert json.loads((base / "config.json").read_text())["dtype"] == "bfloat16", "the cache's own config stays"
    assert (out / "rows.jsonl").read_text() == rows.read_text()


def test_the_seconds_of_llama_factory_are_those_of_training() -> None:
    assert llama_factory.seconds('{"train_loss": 0.5, "train_runtime": 12.5, "epoch": 1.0}') == 12.5


def test_llama_factory_gets_a_file_that_it_can_read(tmp_path: Path) -> None:
    """0.9.5 opens a path that ends in .json as if it were a file."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    out = tmp_path / "out"
    out.mkdir()
    spec = specs_of(tmp_path, ("lora",), base=tmp_path / "models", steps=1, dtype="float32")["lora"]
    task = task_of(AttemptSpec.model_validate_json(spec.read_bytes()), Side("x", "lora", "float32"), out=out)

    assert llama_factory.write(task, out).suffix == ".yaml"
