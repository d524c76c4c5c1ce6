"""What is told of a base model without its weights: asked of its template, and of the model on torch's meta device."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from shared.contract.model_description import DescriptionSpec, ModelDescription
from tests.train.families import make_family
from tests.train.tiny import make_model_directory
from worker.train.description import describe, main


def in_files(folder: Path) -> int:
    """Numbers that its safetensors files hold."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            total += sum(opened.get_tensor(name).numel() for name in opened.keys())  # noqa: SIM118  # no mapping
    return total


def test_a_model_is_described_from_its_config_and_tokenizer_alone(tmp_path: Path) -> None:
    folder = make_model_directory(tmp_path / "model")
    counted = in_files(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (tmp_path / "spec.json").write_text(DescriptionSpec(folder=str(folder)).model_dump_json())

    assert main(tmp_path / "spec.json", tmp_path / "out") == 0

    made = ModelDescription.model_validate_json((tmp_path / "out" / "description.json").read_bytes())
    assert made.notes == []
    assert made.template is not None
    assert (made.template.system, made.template.end_of_turn) == (True, "<|im_end|>")
    assert made.build is not None
    assert made.build.parameters == counted
    config = json.loads((folder / "config.json").read_text())
    assert sum(made.build.layer_types.values()) == config["num_hidden_layers"]
    kinds = {kind.name: kind for kind in made.build.linear}
    assert kinds["down_proj"].inputs == config["intermediate_size"]
    assert kinds["down_proj"].outputs == config["hidden_size"]
    assert kinds["down_proj"].count == config["num_hidden_layers"]
    assert kinds["down_proj"].adapted
    assert bool(made.build.tied) == config["tie_word_embeddings"]


def test_experts_and_layer_types_come_from_the_build(tmp_path: Path) -> None:
    made = describe(make_family(tmp_path / "moe", "qwen3_moe")).build

    assert made is not None
    assert {kind.name for kind in made.experts} == {"gate_up_proj", "down_proj"}
    assert all(len(kind.shape) == 3 for kind in made.experts)
    hybrid = describe(make_family(tmp_path / "hybrid", "qwen3_next")).build
    assert hybrid is not None
    assert {"linear_attention", "full_attention"} >= set(hybrid.layer_types)
    assert "linear_attention" in hybrid.layer_types


def test_what_cannot_be_told_is_a_note_and_the_rest_is_told(tmp_path: Path) -> None:
    folder = make_model_directory(tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "invented_later"}')

    made = describe(folder)

    assert made.build is None
    assert made.notes[0].startswith("The model cannot be built from its config.json: ValueError")
    assert len(made.notes[0]) < 400
