"""A base model's folder comes from strangers: everything but plain, consistent data is refused by name."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.errors import Invalid
from worker.base_models import verify

ROOT = Path(__file__).parents[2]
CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512}


def write_tensors(file: Path, header: Any, *, data: int = 8, length: int | None = None) -> None:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(content) if length is None else length
    file.write_bytes(size.to_bytes(8, "little") + content + bytes(data))


def tensor(begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [4], "data_offsets": [begin, end]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An honest model."""
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(CONFIG))
    write_tensors(place / "model.safetensors", {"a": tensor(0, 4), "b": tensor(4, 8)})
    return place


def configured(**values: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(json.dumps({**CONFIG, **values}))


def with_header(header: Any, **options: Any) -> Callable[[Path], object]:
    return lambda folder: write_tensors(folder / "model.safetensors", header, **options)


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def indexed(document: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps(document))


def linked_out(folder: Path) -> None:
    (folder.parent / "secret.json").write_text("{}")
    (folder / "tokenizer.json").symlink_to(folder.parent / "secret.json")


def test_an_honest_model_is_accepted(folder: Path) -> None:
    verify(folder)


def test_links_of_a_hub_cache_stay_within_it(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)

    verify(snapshot)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        pytest.param(only_pickles, "pytorch_model.bin can run code", id="pickle weights only"),
        pytest.param(lambda f: (f / "modeling_x.py").touch(), "modeling_x.py can run code", id="code"),
        pytest.param(lambda f: (f / "model.safetensors").unlink(), "no .safetensors file", id="no weights"),
        pytest.param(configured(auto_map={"AutoModel": "x.Y"}), "'auto_map', which names code", id="auto_map"),
        pytest.param(
            configured(text_config={"auto_map": {"AutoModel": "x.Y"}}), "'auto_map', which names code", id="nested"
        ),
        pytest.param(
            configured(_attn_implementation_internal="evil/kernel"), "_attn_implementation_internal", id="CVE-2026-4372"
        ),
        pytest.param(
            configured(_attn_implementation="evil/kernel:run"), "a repository of code to run", id="kernel repository"
        ),
        pytest.param(
            configured(attn_implementation={"text_config": "x", "attn_implementation": "evil/kernel"}),
            "a repository of code to run",
            id="kernel repository in a dict",
        ),
        pytest.param(configured(hidden_size=10**12), "no size of a model", id="absurd size"),
        pytest.param(configured(num_hidden_layers=-1), "no size of a model", id="negative size"),
        pytest.param(configured(vocab_size="512"), "no size of a model", id="size of another type"),
        pytest.param(lambda f: (f / "config.json").write_text("[" * 100_000), "not valid JSON", id="deep JSON"),
        pytest.param(lambda f: (f / "config.json").write_text("[]"), "not a JSON object", id="no object"),
        pytest.param(with_header({}, length=1 << 40), "impossible length", id="lying header length"),
        pytest.param(with_header({"a": tensor(0, 4)}, data=8), "its header describes", id="bytes nobody describes"),
        pytest.param(with_header({"a": tensor(0, 1 << 40)}), "its header describes", id="tensor beyond the end"),
        pytest.param(with_header({"a": tensor(0, 8), "b": tensor(4, 8)}), "overlapping", id="overlapping offsets"),
        pytest.param(with_header({"a": tensor(0.0, 8.5)}), "no numbers", id="offsets that are no numbers"),
        pytest.param(with_header({"a": {}}), "describes no tensors", id="no offsets"),
        pytest.param(with_header(b"\xff\xfe{}"), "describes no tensors", id="header that is no JSON"),
        pytest.param(indexed({"weight_map": {"a": "model-2.safetensors"}}), "which is not there", id="missing shard"),
        pytest.param(indexed({"weight_map": {"a": "../x.safetensors"}}), "which is not there", id="shard elsewhere"),
        pytest.param(indexed({"weight_map": []}), "no weight_map", id="no map"),
        pytest.param(linked_out, "leads out of the model's folder", id="link out of the folder"),
    ],
)
def test_a_hostile_model_is_refused_by_name(folder: Path, spoil: Callable[[Path], object], says: str) -> None:
    spoil(folder)

    with pytest.raises(Invalid, match="The base model is refused") as refused:
        verify(folder)

    assert refused.value.code == "base_model_refused"
    assert says in refused.value.message


def test_no_call_in_the_tree_would_run_a_strangers_code() -> None:
    """Every `from_pretrained` of transformers says `trust_remote_code=False` itself, or passes options that do."""
    calls = [
        (f"{path.relative_to(ROOT)}:{call.lineno}", call)
        for part in ("api", "worker", "shared", "standalone", "examples", "bench", "cli")
        for path in sorted((ROOT / part).rglob("*.py"))
        if "from_pretrained" in (text := path.read_text(encoding="utf-8"))
        for call in ast.walk(ast.parse(text))
        if isinstance(call, ast.Call) and _loads(call) and ast.unparse(call.func).startswith("Auto")
    ]

    assert len(calls) >= 4
    assert [place for place, call in calls if not _distrusts(call)] == []


def _loads(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained"


def _distrusts(call: ast.Call) -> bool:
    named = {word.arg: ast.unparse(word.value) for word in call.keywords}
    return named.get("trust_remote_code") == "False" or named.get(None) == "source"
