"""Renders the Helm chart as a cluster would get it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).parents[1] / "deploy/helm/tunepool"
OUTSIDE: dict[str, Any] = {"existingSecret": "tunepool", "storage": {"url": "s3://bucket/tunepool"}}
BUNDLED: dict[str, Any] = {
    "existingSecret": "tunepool",
    **{part: {"bundled": True} for part in ("database", "redis", "storage")},
}
H100: dict[str, Any] = {"deviceBytes": 85_899_345_920, "capability": 90}


def sdk() -> Any:
    """The Helm SDK, or a skip: its wheel is for Linux on x86-64 alone."""
    return pytest.importorskip("helm_python", reason="the Helm SDK's wheel is for Linux on x86-64")


def documents(values: dict[str, Any]) -> list[dict[str, Any]]:
    """What `helm install tp -n ml` would create. Raises HelmError."""
    with sdk().Chart.load(str(CHART)) as chart:
        chart.validate_schema(values)
        made = chart.render(values, name="tp", namespace="ml")
    texts = (text for name, text in made.items() if not name.endswith("NOTES.txt"))
    return [document for text in texts for document in yaml.safe_load_all(text) if document]
