"""What an administrator wants as a base model: a hub's repository at a revision, or a folder. Names are judged here."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from shared.errors import Invalid

Source = Literal["hub", "path"]

# What a hub takes for a repository, and git for a branch, a tag or a commit. Neither climbs out of its place.
_PART: Final = r"\w(?:[\w.-]{0,94}\w)?"
_REPOSITORY: Final = re.compile(rf"{_PART}/{_PART}", re.ASCII)
_REVISION: Final = re.compile(r"\w[\w./-]{0,199}", re.ASCII)
COMMIT: Final = re.compile(r"[0-9a-f]{40}")
# A name is a part of addresses and of folders' names. An alias is what scripts say, a hub's id for instance.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_ALIAS: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}")
_ADAPTER: Final = "ft:"
_PATH_CHARACTERS: Final = 1000


@dataclass(frozen=True, slots=True)
class PendingEntry:
    """An entry whose commit and facts are looked up by a worker; `note` says why that takes long."""

    name: str
    locator: str  # hub: repository; path: folder
    revision: str  # hub: a branch, a tag or a commit; path: empty
    owned_by: str
    public_name: str
    note: str = ""
    source: Source = "hub"
    created: int = 0

    @property
    def key(self) -> str:
        """The id of what is looked up; two entries may share it. It is the name of a folder, too."""
        wanted = f"hub:{self.locator}@{self.revision}" if self.source == "hub" else f"path:{self.locator}"
        return f"base_{hashlib.sha256(wanted.encode()).hexdigest()[:32]}"

    @property
    def wanted(self) -> str:
        """In words: where its config.json is read."""
        return f"{self.locator} at revision {self.revision}" if self.source == "hub" else f"the folder {self.locator}"


@dataclass(frozen=True, slots=True)
class HubAnswer:
    """What a worker has found: the commit and config.json, or why it has not. Of a folder there is no commit."""

    commit: str | None = None
    config: str | None = None
    refused: str = ""  # only people can mend it
    note: str = ""  # not yet; or, of one that can be used, what the last look-up has met
    weights: Mapping[str, Any] | None = None  # what the headers of its weights say
    looked_at: int = 0  # Unix seconds
    description: Mapping[str, Any] | None = None  # shared/contract/model_description.py


@dataclass(frozen=True, slots=True)
class WantedModel:
    """A judged request for a base model: every name in it may be used."""

    name: str
    source: Source
    locator: str
    revision: str
    aliases: tuple[str, ...] = field(default=())


def wanted_model(
    source: str, *, revision: str | None = None, name: str | None = None, aliases: Sequence[str] = ()
) -> WantedModel:
    """A request as what it asks for. A name that is not given is made of the repository's or the folder's.

    Raises Invalid naming the field.
    """
    if source.startswith("/"):
        kind, locator, at = "path", _folder(source), _no_revision(revision)
    else:
        kind, locator, at = "hub", repository(source, param="source"), revision_of(revision or "main", param="revision")
    chosen = _name(locator.rsplit("/", 1)[1].lower() if name is None else name)
    return WantedModel(chosen, "path" if kind == "path" else "hub", locator, at, _aliases(aliases, chosen))


def repository(text: str, *, param: str) -> str:
    """The name of a hub's repository. Raises Invalid."""
    if _REPOSITORY.fullmatch(text) is None or ".." in text or "--" in text:
        raise Invalid(
            f"Its repository must be 'owner/name', not '{text[:200]}': neither an address nor a relative path. "
            "A folder is given by its absolute path.",
            param=param,
        )
    return text


def revision_of(text: str, *, param: str) -> str:
    """A revision that git would take. Raises Invalid."""
    if _REVISION.fullmatch(text) is None or ".." in text or text.endswith(("/", ".", ".lock")):
        raise Invalid(f"Its revision must be a branch, a tag or a commit, not '{text[:200]}'.", param=param)
    return text


def _folder(path: str) -> str:
    if len(path) > _PATH_CHARACTERS or os.path.normpath(path) != path or path == "/" or path.startswith("//"):
        raise Invalid(
            f"Its folder must be an absolute path without '.', '..' or a slash at its end, not '{path[:200]}'.",
            param="source",
        )
    return path


def _no_revision(revision: str | None) -> str:
    if revision is not None:
        raise Invalid(
            f"A folder has no revision '{revision[:100]}': leave it out. Only a repository of a hub has revisions.",
            param="revision",
        )
    return ""


def _name(name: str) -> str:
    if _NAME.fullmatch(name) is None or ".." in name:
        raise Invalid(
            f"The name '{name[:100]}' of a base model must be 1 to 100 letters, digits, '.', '_' and '-', and begin "
            "with a letter or a digit. Give another as `name`.",
            param="name",
        )
    return name


def _aliases(aliases: Sequence[str], name: str) -> tuple[str, ...]:
    for place, alias in enumerate(aliases):
        if _ALIAS.fullmatch(alias) is None or ".." in alias:
            raise Invalid(
                f"The alias '{alias[:100]}' must be 1 to 200 letters, digits, '.', '_', ':', '/' and '-', and begin "
                "with a letter or a digit.",
                param=f"aliases.{place}",
            )
        if alias.startswith(_ADAPTER):
            raise Invalid(f"The alias '{alias[:100]}' is an adapter's: names that begin with ft: are.", param="aliases")
        if alias == name or alias in aliases[:place]:
            raise Invalid(f"The alias '{alias[:100]}' is given twice, or is the name itself.", param=f"aliases.{place}")
    return tuple(aliases)
