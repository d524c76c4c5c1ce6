"""The command's exports: what is asked for, what is fetched, and what people are shown. No server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tunepool import adapters, exports

FILES = [
    {"name": "model-q8_0.gguf", "bytes": 1000, "sha256": "a" * 64, "url": "u1"},
    {"name": "Modelfile", "bytes": 30, "sha256": "b" * 64, "url": "u2"},
]
RECORD: dict[str, Any] = {
    "id": "export_1",
    "status": "succeeded",
    "request": {"adapter": "ft:tiny", "format": "gguf", "quantization": "q8_0"},
    "error": None,
    "detail": None,
    "files": FILES,
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """The downloads that are asked for: address and place."""
    calls: list[tuple[str, Path]] = []
    monkeypatch.setattr(adapters, "_fetch", lambda url, target, **_: calls.append((url, target)))
    return calls


def test_a_name_that_ends_in_gguf_is_the_file_and_any_other_a_folder(
    asked: list[tuple[str, Path]], tmp_path: Path
) -> None:
    exports.fetched(RECORD, tmp_path / "tickets.gguf")
    assert asked == [("u1", tmp_path / "tickets.gguf")]

    asked.clear()
    exports.fetched(RECORD, tmp_path / "folder")
    assert asked == [("u1", tmp_path / "folder/model-q8_0.gguf"), ("u2", tmp_path / "folder/Modelfile")]


def test_people_see_what_was_made_and_why_it_was_not() -> None:
    shown = exports.lines(RECORD)
    failed = exports.lines({**RECORD, "files": [], "error": {"message": "The tokenizer is not known."}})
    pushed = exports.line({**RECORD, "request": {"model": "ft:tiny", "repository": "acme/tickets"}})

    assert shown[0] == "export_1  succeeded  gguf q8_0  ft:tiny"
    assert shown[1].startswith("model-q8_0.gguf  1,000 bytes")
    assert failed[1] == "The tokenizer is not known."
    assert pushed == "export_1  succeeded  ft:tiny to acme/tickets"
