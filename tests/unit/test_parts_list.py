"""The list of parts names all that is installed, once, and refers to nothing that it does not name."""

from __future__ import annotations

from importlib import metadata

from standalone.parts_list import parts_list


def test_every_installed_part_is_named_once_and_every_reference_leads_somewhere() -> None:
    made = parts_list()

    references = [part["bom-ref"] for part in made["components"]]
    assert len(set(references)) == len(references) > 50
    assert f"pkg:pypi/pydantic@{metadata.version('pydantic')}" in references
    assert {entry["ref"] for entry in made["dependencies"]} == set(references)
    assert {name for entry in made["dependencies"] for name in entry["dependsOn"]} <= set(references)
    assert made["metadata"]["component"]["name"] == "tunepool-server"
