"""Act one: the tokenizer. Without the libraries of weights, which a preflight has no use for."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from shared.contract.merge_request import MergeSpec
from shared.contract.spec import AttemptSpec, PreflightSpec


def load_tokenizer(spec: AttemptSpec | MergeSpec | PreflightSpec) -> Any:
    """The base model's tokenizer, with the job's chat template if it brings one and a padding token in any case."""
    tokenizer = AutoTokenizer.from_pretrained(spec.base_model_path, trust_remote_code=False, local_files_only=True)
    if spec.job.training.chat_template is not None:
        tokenizer.chat_template = spec.job.training.chat_template
    if tokenizer.pad_token_id is None:
        # Padding is told apart by the attention mask, never by its id, so sharing the end token is harmless.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
