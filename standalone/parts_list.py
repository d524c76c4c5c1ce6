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
    known = {_name(one): one for one in metadata.distributions()}
    ours = known.pop(OURS, None)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": _component(OURS, ours, kind="application")},
        "components": [_component(name, known[name], kind="library") for name in sorted(known)],
        "dependencies": [
            {"ref": _reference(name, one), "dependsOn": sorted(_needs(one, known))}
            for name, one in sorted(known.items())
        ],
    }


def _component(name: str, one: metadata.Distribution | None, *, kind: str) -> dict[str, Any]:
    version = "unknown" if one is None else one.version
    found = {"type": kind, "name": name, "version": version, "bom-ref": _reference(name, one)}
    if kind == "library":
        found["purl"] = _reference(name, one)
    if one is None or "License-Expression" not in one.metadata:
        return found
    return {**found, "licenses": [{"expression": one.metadata["License-Expression"]}]}


def _reference(name: str, one: metadata.Distribution | None) -> str:
    return f"pkg:pypi/{name}@{'unknown' if one is None else one.version}"


def _needs(one: metadata.Distribution, known: dict[str, metadata.Distribution]) -> Iterator[str]:
    for line in one.requires or ():
        name = _normal(re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0])
        if name in known and "extra ==" not in line:
            yield _reference(name, known[name])


def _name(one: metadata.Distribution) -> str:
    return _normal(one.metadata["Name"])


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    hide_secrets()
    json.dump(parts_list(), sys.stdout, indent=1)
    sys.stdout.write("\n")
