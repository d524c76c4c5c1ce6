"""Families of base models are known by name in one module; everybody else asks it, or the model itself."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = "shared/contract/families.py"
NAMES = re.compile(
    r"gemma|qwen|llama|mistral|mixtral|mamba|falcon|granite|deepseek|gpt_?oss|gpt2|gpt_?neo|phi[-_]?\d|olmo|glm|nemotron"
    r"|lfm|starcoder|bloom|exaone|ernie|smollm|cohere|jamba|zamba|rwkv|kimi|minimax",
    re.IGNORECASE,
)
# llama.cpp and Ollama are programs; forms of rows, and columns of published ones; keys of a config; how layers compute.
OTHER_SENSES = re.compile(
    r"llama[._]cpp|ollama|cohere_roles|cohere's first api|^deepseek_(solution|attempt|reasoning|thinking_trajectory)$"
    r"|^\^\(mamba_|^mamba2?$",
    re.IGNORECASE,
)
# llama.cpp's own names for what it computes; the one model that the installation brings.
ELSEWHERE = re.compile(r"/gguf_\w+\.py$|/to_gguf\.py$|^shared/settle/catalogue\.py$")


def names_in(source: str) -> Iterator[str]:
    """Texts of a module that name a family, but in its documentation."""
    tree = ast.parse(source)
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        said = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation
        if said and NAMES.search(OTHER_SENSES.sub("", node.value)):
            yield f"{node.lineno}: {node.value[:60]}"


def test_nobody_but_the_table_knows_a_family_by_its_name() -> None:
    files = [file for folder in ("shared", "worker") for file in sorted((ROOT / folder).rglob("*.py"))]
    named = {
        place: lines
        for file in files
        if (place := file.relative_to(ROOT).as_posix()) != TABLE
        and not ELSEWHERE.search(place)
        and (lines := list(names_in(file.read_text(encoding="utf-8"))))
    }

    assert len(files) > 300
    assert named == {}
    assert list(names_in((ROOT / TABLE).read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "line",
    [
        'x = name.startswith("Gemma")',
        'x = kind in {"qwen3_next", "other"}',
        'x = re.compile(r"Mamba|SSM")',
        'x = f"{name} Qwen"',
        'match kind:\n    case "gpt_oss":\n        pass',
    ],
)
def test_a_branch_on_a_name_is_seen(line: str) -> None:
    assert list(names_in(line))
    assert not list(names_in('"""As Gemma and Qwen do."""\nx = "llama.cpp"  # as Gemma'))
