"""What an installation is made of, as a CycloneDX 1.6 document: `python -m standalone.parts_list > sbom.json`.

Names, versions and licences are those that each installed distribution states of itself; nothing is asked elsewhere.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any, Final

from shared.operating.secrecy import hide_secrets

OURS: Final = "tunepool-server"


def parts_list() -> dict[str, Any]:
    """The document. The same installation gives the same one."""
    known = {_name(distribution): distribution for distribution in metadata.distributions()}
    ours = known.pop(OURS, None)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": _component(OURS, ours, kind="application")},
        "components": [_component(name, known[name], kind="library") for name in sorted(known)],
        "dependencies": [
            {"ref": _reference(name, distribution), "dependsOn": sorted(_needs(distribution, known))}
            for name, distribution in sorted(known.items())
        ],
    }


def _component(name: str, distribution: metadata.Distribution | None, *, kind: str) -> dict[str, Any]:
    version = "unknown" if distribution is None else distribution.version
    component = {"type": kind, "name": name, "version": version, "bom-ref": _reference(name, distribution)}
    if kind == "library":
        component["purl"] = _reference(name, distribution)
    if distribution is None or "License-Expression" not in distribution.metadata:
        return component
    return {**component, "licenses": [{"expression": distribution.metadata["License-Expression"]}]}


def _reference(name: str, distribution: metadata.Distribution | None) -> str:
    return f"pkg:pypi/{name}@{'unknown' if distribution is None else distribution.version}"


def _needs(distribution: metadata.Distribution, known: dict[str, metadata.Distribution]) -> Iterator[str]:
    for line in distribution.requires or ():
        name = _normal(re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0])
        if name in known and "extra ==" not in line:
            yield _reference(name, known[name])


def _name(distribution: metadata.Distribution) -> str:
    return _normal(distribution.metadata["Name"])


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    hide_secrets()
    json.dump(parts_list(), sys.stdout, indent=1)
    sys.stdout.write("\n")
