"""Merges, combinations and exports: the bodies of their requests, and the file that their programs are started with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from shared.contract.gguf_formats import DEFAULT_QUANTIZATION, GgufFormat, GgufQuantization
from shared.contract.part import Part
from shared.contract.spec import JobSpec

AdapterName = Annotated[str, StringConstraints(min_length=1, max_length=300)]

CombinationType = Literal[
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]


class CreateMerge(Part):
    """Body of `POST /v1/tunepool/merges`: an adapter becomes part of its base model's weights."""

    adapter: AdapterName = Field(description="An adapter, checkpoint or combination, by id or `ft:` name.")
    onto: Literal["base", "dequantized"] = Field(
        description="base: the weights as published. dequantized: those that a QLoRA adapter was trained on, 4 bits "
        "expanded again; closer to adapter plus 4-bit base. There is no default: the two models differ."
    )


class WeightedAdapter(Part):
    adapter: AdapterName
    weight: float = Field(default=1.0, ge=-100.0, le=100.0)


class CreateCombination(Part):
    """Body of `POST /v1/tunepool/combinations`; names and meanings are PEFT's `add_weighted_adapter`."""

    adapters: list[WeightedAdapter] = Field(min_length=2, max_length=16)
    combination_type: CombinationType = Field(
        description="cat and svd are exact (svd up to svd_rank); linear needs equal ranks and is an approximation."
    )
    density: float | None = Field(
        default=None, gt=0.0, lt=1.0, description="Share of values kept by ties, dare and magnitude_prune."
    )
    majority_sign_method: Literal["total", "frequency"] = "total"
    svd_rank: int | None = Field(default=None, ge=1, le=1024, description="Rank of the result; null: the largest.")
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="dare drops values at random.")


class CreateExport(Part):
    """Body of `POST /v1/tunepool/exports`: a tuned model as files for llama.cpp and Ollama."""

    adapter: AdapterName = Field(description="A tuned model, checkpoint or combination, by id, `ft:` name or alias.")
    format: GgufFormat = Field(
        description="gguf: the whole model, merged. gguf_lora: the adapter alone, beside a GGUF file of its base."
    )
    quantization: GgufQuantization | None = Field(
        default=None,
        description="How numbers are kept. null: q8_0 for gguf, f16 for gguf_lora, which takes f32, f16 and bf16.",
    )
    onto: Literal["base", "dequantized"] | None = Field(
        default=None,
        description="Of gguf: the weights that the adapter is merged into, as of a merge. null: base, and after qlora "
        "or qdora an error, because the two models differ.",
    )

    @property
    def settled(self) -> GgufQuantization:
        return self.quantization or DEFAULT_QUANTIZATION[self.format]


class CreatePush(Part):
    """Body of `POST /v1/tunepool/pushes`: the files of a model, as they are, into a repository of the hub."""

    model: AdapterName = Field(
        description="A tuned model, checkpoint or combination, a finished merge, or a finished export, by id or name."
    )
    repository: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$",
        description="`organization/name`. It is made if it is not there; files of the same names are replaced.",
    )
    private: bool = Field(default=True, description="Of a repository that is made; one that is there stays as it is.")


class MergeSpec(Part):
    """The file that `worker.train.merge`, `worker.train.combine` and `worker.train.to_gguf` are started with."""

    name: str = Field(description="Under which the product will be known.")
    request: CreateMerge | CreateCombination | CreateExport
    job: JobSpec = Field(description="Of the job that made the (first) adapter.")
    base_model_path: str
    adapter_paths: list[str] = Field(description="PEFT directories, in the order of the request.")
    cpu_threads: int = Field(default=1, ge=1)
    memory_limit_bytes: int | None = Field(default=None, description="Refuse to grow past this; null: no limit.")
