"""Loads the tokenizer. It imports no library of weights: a preflight needs none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from transformers import AutoTokenizer

from shared.contract.merge_request import MergeSpec
from shared.contract.spec import AttemptSpec, PreflightSpec
from shared.errors import Invalid

# What a folder has in place of a tokenizer.json, and transformers needs further libraries to read.
_MODELS_ALONE: Final = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model")


def load_tokenizer(spec: AttemptSpec | MergeSpec | PreflightSpec) -> Any:
    """The base model's tokenizer, with the job's chat template if it brings one and a padding token in any case.

    Raises:
        Invalid: it is of a kind that does not tell which characters a token stands for.
    """
    tokenizer = load_tokenizer_of(spec.base_model_path)
    if not tokenizer.is_fast:
        raise _not_fast(type(tokenizer).__name__)
    if spec.job.training.chat_template is not None:
        tokenizer.chat_template = spec.job.training.chat_template
    return tokenizer


def load_tokenizer_of(folder: str) -> Any:
    """The tokenizer that lies beside a model's weights, with a padding token in any case.

    Without a tokenizer.json transformers builds the same from vocab.json and merges.txt, of the classes that it knows.

    Raises:
        Invalid: it is a SentencePiece or tiktoken model alone, for which the worker has no reader.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ImportError, ValueError) as error:
        alone = next((name for name in _MODELS_ALONE if (Path(folder) / name).is_file()), None)
        if alone is None or (Path(folder) / "tokenizer.json").is_file():
            raise
        raise _not_fast(alone) from error
    if tokenizer.pad_token_id is None:
        # Padding is told apart by the attention mask, never by its id, so sharing the end token is harmless.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _not_fast(what: str) -> Invalid:
    return Invalid(
        f"The base model's tokenizer ({what}) does not tell which characters a token stands for, so answers cannot be"
        " masked exactly. Choose a base model that brings a tokenizer.json, or write one beside its weights where"
        " transformers and sentencepiece are installed: AutoTokenizer.from_pretrained(…).save_pretrained(…).",
        code="no_fast_tokenizer",
        param="model",
    )


def generation_ends(tokenizer: Any, folder: Path) -> tuple[str, ...]:
    """Tokens that end a generation of the base model in `folder`: the tokenizer's, and those that its files name."""
    numbers = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        if (file := folder / name).is_file():
            named = json.loads(file.read_bytes()).get("eos_token_id")
            numbers |= set(named if isinstance(named, list) else [named])
    added = tokenizer.added_tokens_decoder
    return tuple(added[number].content for number in sorted(numbers - {None}) if number in added)
