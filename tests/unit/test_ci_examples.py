"""The files of examples/ci are ones that their systems read, and their pipeline and gate are ones that we read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tunepool.pipeline.document import read_pipeline

from shared.contract.evaluation import CreateEvaluation
from shared.contract.gate_file import read_gate
from tests.patience import patience

EXAMPLES = Path(__file__).parents[2] / "examples/ci"


@pytest.mark.parametrize(
    ("schema", "file"),
    [
        ("vendor.github-workflows", ".github/workflows/train.yml"),
        ("vendor.github-actions", ".github/actions/tunepool/action.yml"),
        ("vendor.gitlab-ci", ".gitlab-ci.yml"),
    ],
)
def test_a_file_for_a_ci_system_is_valid_by_the_schema_of_that_system(schema: str, file: str) -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "check-jsonschema", "--builtin-schema", schema, EXAMPLES / file],
        capture_output=True,
        text=True,
        timeout=patience(60),
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_pipeline_and_the_gate_are_read_and_agree() -> None:
    pipeline = read_pipeline(EXAMPLES / "pipeline.yaml")
    gate = read_gate((EXAMPLES / str(pipeline.gate)).read_bytes())

    assert pipeline.evaluate is not None
    asked = CreateEvaluation.model_validate(
        {"subjects": ["x"], "items": {"type": "file", "file_id": "f"}, "measures": pipeline.evaluate.measures}
    )
    measured = {measure.name for measure in asked.measures} | {"size_bytes"}
    assert {name.rsplit(".", 1)[1] for stated in gate.assertions for name in stated.named} == measured


@pytest.mark.parametrize(
    "file",
    [".github/workflows/train.yml", ".github/actions/tunepool/action.yml", ".gitlab-ci.yml", "Jenkinsfile"],
)
def test_every_example_runs_the_pipeline_and_cancels_when_it_is_cancelled(file: str) -> None:
    text = (EXAMPLES / file).read_text(encoding="utf-8")

    assert "tunepool run pipeline.yaml" in text or 'tunepool run "$PIPELINE"' in text
    assert "--on-interrupt cancel" in text
