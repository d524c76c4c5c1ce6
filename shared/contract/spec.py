"""The spec of a job: every value is settled. Its parts are shared with the request.

The request nests the *open* form of a part (every field may be "auto"); the resolved `JobSpec` nests the part itself.
Pure: pydantic only, no I/O, no clock.
"""

from __future__ import annotations

from datetime import datetime
from functools import cache
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import Field, SerializerFunctionWrapHandler, StringConstraints, model_serializer

from shared.contract.base_facts import ModelFacts
from shared.contract.part import Part
from shared.contract.template_time import TemplateTime, written_time

Auto = Literal["auto"]
AUTO: Auto = "auto"

MethodName = Literal["lora", "qlora", "dora", "qdora", "full"]
ObjectiveName = Literal["supervised", "dpo", "kto", "orpo", "simpo"]
DEFAULT_OBJECTIVE: Final[ObjectiveName] = "supervised"
Strategy = Literal["single", "ddp", "fsdp"]
Tier = Literal["interactive", "normal", "best_effort"]
Dtype = Literal["bfloat16", "float16", "float32"]
Optimizer = Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_torch", "sgd"]
# What the trainer computes in a faster way of its own, with the same result (docs/trainer.md).
FastRoad = Literal[
    "row_attention",
    "varlen_attention",
    "fused_lora",
    "fused_norms",
    "fused_swiglu",
    "fused_rotary",
    "fused_optimizer",
    "background_saving",
    "cpu_kernels",
    "joined_products",
    "shared_beginnings",
]
DeviceKind = Literal["cuda", "cpu"]  # as torch names them: AMD's GPUs are "cuda" too
# Canonical rows: what a checked file holds (shared/rows/formats.py).
Format = Literal["chat", "prompt_completion", "text", "preference", "kto"]
# How a job begins whose `model` is a tuned one: its adapter trains on, or a new one is trained on top of it.
InitFrom = Literal["continue", "merged"]
Preset = Literal["prototype", "general", "complex", "large_dataset"]

# A module name is matched as a suffix, never as a regular expression: a pattern from a stranger can take for ever.
ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.]{1,200}$")]


# Names by which rows are read; those of shared.rows.formats, which a test compares.
ColumnName = Literal[
    "messages", "prompt", "completion", "text", "label", "chosen", "rejected", "preferred_completion",
    "non_preferred_completion", "conversations", "instruction", "input", "output", "history", "system", "tools",
    "functions", "parallel_tool_calls", "reasoning_content",
]  # fmt: skip
Columns = Annotated[
    dict[ColumnName, Annotated[str, StringConstraints(min_length=1, max_length=200)]], Field(min_length=1)
]


class Adapter(Part):
    """How the weights are adapted; names and meanings are PEFT's `LoraConfig`."""

    method: MethodName = Field(default="qlora", description="lora, qlora, dora, qdora, or full (every weight trains).")
    r: int = Field(default=16, ge=1, le=1024, description="Rank of the update matrices.")
    lora_alpha: int = Field(default=16, ge=1, le=65536, description="Scale: the update is multiplied by lora_alpha/r.")
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    target_modules: Literal["all-linear", "experts"] | list[ModuleName] = Field(
        default="all-linear",
        description="Names of linear modules; all-linear: every one of the language model but the output layer, "
        "routers and experts; experts: the experts too.",
    )
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = Field(default=False, description="Scale by lora_alpha/sqrt(r) (arXiv 2312.03732).")
    init_lora_weights: Literal["default", "gaussian", "pissa", "olora", "eva", "loftq"] = "default"
    rank_pattern: dict[ModuleName, Annotated[int, Field(ge=1, le=1024)]] = Field(default_factory=dict, max_length=1000)
    alpha_pattern: dict[ModuleName, Annotated[int, Field(ge=1, le=65536)]] = Field(
        default_factory=dict, max_length=1000
    )
    layers_to_transform: list[Annotated[int, Field(ge=0, le=1000)]] | None = None
    modules_to_save: list[ModuleName] | None = None
    loraplus_lr_ratio: float | None = Field(
        default=None, ge=1.0, le=1000.0, description="LoRA+: learning rate of B over that of A (arXiv 2402.12354: ~16)."
    )


class Quantization(Part):
    """How the frozen base is stored while it is adapted; names are transformers' `BitsAndBytesConfig`."""

    load_in_4bit: bool = True
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: Dtype = "bfloat16"
    load_experts_in_4bit: bool = Field(
        default=False, description="Stacks of experts as well, which bitsandbytes leaves as they are."
    )
    dequantize: bool = Field(default=False, description="Expand an MXFP4 or FP8 base to 16 bits as it is loaded.")


# Measures of answers that need nothing but the reference; names are those of evaluations.
AnswerMeasure = Literal["exact_match", "contains", "json_valid", "numeric"]
_EXACT_MATCH: Final[list[AnswerMeasure]] = ["exact_match"]


class GeneratedAnswers(Part):
    """Rows of the validation file that are answered at each look, greedily, and measured against their own answer."""

    rows: int = Field(default=32, ge=1, le=500, description="The first so many that ask something.")
    max_tokens: int = Field(default=128, ge=1, le=4096, description="Of one answer.")
    measures: list[AnswerMeasure] = Field(default_factory=_EXACT_MATCH.copy, min_length=1, max_length=4)
    max_seconds: int = Field(default=120, ge=1, le=3600, description="Of one look; a longer one chooses no checkpoint.")


class Evaluation(Part):
    """When the validation file is looked at."""

    steps: int | None = Field(default=None, ge=1, le=1_000_000, description="Every so many steps; null: four times.")
    max_rows: int = Field(default=500, ge=1, le=100_000)
    generate: GeneratedAnswers | None = Field(default=None, description="Answers to be measured beside the loss.")


class PublishBy(Part):
    """The checkpoint whose answers were best by a measure of `eval.generate`; of equal ones that of the lower loss."""

    by: AnswerMeasure


class EarlyStopping(Part):
    """Stop when the validation loss has not fallen by `min_delta` for `patience` evaluations."""

    patience: int = Field(default=3, ge=1, le=1000)
    min_delta: float = Field(default=0.0, ge=0.0, le=100.0)


class Training(Part):
    """The optimizer run; names are transformers' `TrainingArguments` where it has one."""

    learning_rate: float = Field(default=2e-4, gt=0.0, le=1.0)
    num_train_epochs: int = Field(default=3, ge=1, le=50)
    max_steps: int | None = Field(default=None, ge=1, le=10_000_000, description="Ends the run after this many steps.")
    batch_size: int = Field(default=8, ge=1, le=256, description="Rows per optimizer step over all devices.")
    per_device_train_batch_size: int = Field(
        default=1, ge=1, le=256, description="Rows per forward pass (micro-batch)."
    )
    max_length: int = Field(
        default=2048, ge=8, le=1_048_576, description="Tokens per row; longer rows are cut at the end."
    )
    packing: bool = Field(default=True, description="Fill sequences with several rows; no token sees another row's.")
    optim: Optimizer = "paged_adamw_8bit"
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(default=0.03, ge=0.0, le=1.0)
    weight_decay: float = Field(default=0.0, ge=0.0, le=10.0)
    max_grad_norm: float = Field(default=1.0, gt=0.0, le=1000.0)
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations: less memory, about a third slower."
    )
    gradient_checkpointing_layers: int | None = Field(
        default=None, ge=1, le=1000, description="So many layers are recomputed, the first ones; null: all."
    )
    dtype: Dtype = Field(default="bfloat16", description="Arithmetic of the forward and backward pass.")
    neftune_noise_alpha: float | None = Field(default=None, gt=0.0, le=100.0)
    train_on: Literal["assistant", "last_assistant", "all"] = Field(
        default="assistant", description="Which tokens carry loss in chat rows; completions always do."
    )
    chat_template: Annotated[str, StringConstraints(min_length=1, max_length=65536)] | None = Field(
        default=None, description="Jinja template used instead of the base model's own; rendered in a sandbox."
    )
    template_time: TemplateTime | None = Field(
        default=None,
        description="The moment that the chat template's strftime_now writes, in UTC (2026-12-01, 2026-12-01T09:30); "
        "null: when the job was created.",
    )
    mask_reasoning: bool = Field(default=False, description="Reasoning in chat rows is read and carries no loss.")
    drop_history_reasoning: bool = Field(
        default=False, description="Leave the reasoning of answers before the last question out of rows."
    )
    system_prompt: Literal["keep", "merge"] = Field(
        default="keep",
        description="merge: the system text opens the first question, for chat templates that have no place for it.",
    )
    special_tokens: Literal["text", "parse"] = Field(
        default="text",
        description="What control tokens spelled in raw text and completions are: text, or the tokens (parse).",
    )
    columns: Columns | None = Field(
        default=None,
        description="Names of the file's columns where they are others than ours, each beside ours: "
        '{"prompt": "question", "completion": "answer"}.',
    )
    logging_steps: int = Field(default=1, ge=1, le=10_000)
    save_steps: int | None = Field(
        default=None, ge=1, le=1_000_000, description="Every so many; null: every epoch and half hour."
    )
    eval: Evaluation = Evaluation()
    early_stopping: EarlyStopping | None = None
    publish: Literal["best", "last"] | PublishBy = Field(
        default="best",
        description='The checkpoint of the lowest loss, the last, or that of the best answers: {"by": "exact_match"}.',
    )


class Placement(Part):
    """How many devices work on one job, and how they share it."""

    strategy: Strategy = "single"
    gpus: int = Field(default=1, ge=1, le=64, description="Devices per host.")
    nodes: int = Field(default=1, ge=1, le=128, description="Hosts.")
    allow_cpu: bool = Field(
        default=False, description="A job settled for a GPU may also start on a CPU, where it takes many times as long."
    )


class Queue(Part):
    """How the job waits."""

    tier: Tier = "normal"
    priority: int = Field(default=0, ge=-100, le=100, description="Higher goes first inside a project.")
    preemptible: bool = True
    max_runtime_seconds: int | None = Field(default=None, ge=60, le=30 * 86400)
    group: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:/@-]{1,128}$")] | None = None
    supersede: bool | Literal["running"] = Field(
        default=False, description='Cancel older jobs of the same group that wait; "running": those that run, too.'
    )


class Supervised(Part):
    """Next-token loss on the trained spans of chat, prompt/completion or text rows."""

    type: Literal["supervised"] = "supervised"


class Dpo(Part):
    """Direct preference optimization and its relatives (arXiv 2305.18290)."""

    type: Literal["dpo"] = "dpo"
    beta: float = Field(default=0.1, gt=0.0, le=2.0)
    loss_type: Literal["sigmoid", "ipo", "hinge", "robust", "exo_pair", "apo_zero", "apo_down"] = "sigmoid"


class Kto(Part):
    """Kahneman-Tversky optimization on rows labelled good or bad (arXiv 2402.01306)."""

    type: Literal["kto"] = "kto"
    beta: float = Field(default=0.1, gt=0.0, le=2.0)


class Orpo(Part):
    """Odds-ratio preference optimization: next-token loss and preference in one, no reference (arXiv 2403.07691)."""

    type: Literal["orpo"] = "orpo"
    beta: float = Field(default=0.1, gt=0.0, le=2.0, description="Weight of the odds ratio; lambda in the paper.")


class Simpo(Part):
    """Simple preference optimization: length-normalised rewards, no reference (arXiv 2405.14734)."""

    type: Literal["simpo"] = "simpo"
    beta: float = Field(default=2.0, gt=0.0, le=100.0, description="Scale of the reward; the paper uses 2 to 10.")
    gamma: float = Field(default=1.0, ge=0.0, le=100.0, description="Margin that the chosen answer must win by.")


Preference = Annotated[Dpo | Kto | Orpo | Simpo, Field(discriminator="type")]
Objective = Annotated[Supervised | Dpo | Kto | Orpo | Simpo, Field(discriminator="type")]
OBJECTIVE_PARTS: Final[dict[ObjectiveName, type[Part]]] = {
    part.model_fields["type"].default: part for part in get_args(get_args(Objective)[0])
}


@cache
def numbers(objective: type[Part]) -> tuple[str, ...]:
    """Names of the fields of an objective that are numbers. They may stand among a request's hyperparameters too."""
    return tuple(name for name, field in objective.model_fields.items() if field.annotation is float)


class BaseModelRef(Part):
    """The frozen weights: source, pinned revision, facts."""

    name: str = Field(description="Name in the catalogue, as users write it in `model`.")
    public_name: str = Field(description="What an adapter names as its base: a hub id where there is one.")
    source: Literal["hub", "path", "pypi"]
    revision: str = Field(description="Commit SHA, or sha256 of the source file.")
    facts: ModelFacts


class DataFacts(Part):
    """What the file check found; auto values rest on it."""

    format: Format
    train_rows: int = Field(ge=1)
    validation_rows: int = Field(default=0, ge=0)
    mean_characters: float = Field(default=0.0, ge=0.0, description="Mean characters per row.")
    max_characters: int = Field(default=0, ge=0)


class ParentFile(Part):
    """A file of the parent's directory, as it was published."""

    name: str
    bytes: int
    sha256: str


class Parent(Part):
    """The tuned model that a job goes on from."""

    id: str = Field(description="Of the adapter or the checkpoint.")
    name: str = Field(description="Its `ft:` name.")
    job_id: str
    init_from: InitFrom
    method: MethodName
    rank: int = Field(ge=0, description="Largest rank of its published adapter; 0: it is a whole model.")
    files: list[ParentFile]


class JobSpec(Part):
    """A job with every value settled. Stored as JSON, read by the trainer."""

    version: Literal[1] = 1
    base_model: BaseModelRef
    objective: Objective
    data: DataFacts
    adapter: Adapter
    quantization: Quantization
    training: Training
    placement: Placement
    queue: Queue
    seed: int = Field(ge=0, le=2**31 - 1)
    parent: Parent | None = None

    def dated(self, created: datetime | None) -> JobSpec:
        """The same job with the time settled that its chat template writes; None: it is not created yet."""
        if created is None or self.training.template_time is not None:
            return self
        training = self.training.model_copy(update={"template_time": written_time(created)})
        return self.model_copy(update={"training": training})

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without keys that the version before does not know, where they say nothing: it reads all other jobs."""
        written: dict[str, Any] = write(self)
        if self.parent is None:
            del written["parent"]
        if self.training.gradient_checkpointing_layers is None:
            written["training"].pop("gradient_checkpointing_layers", None)
        if self.training.template_time is None:
            written["training"].pop("template_time", None)
        return written


class AttemptSpec(Part):
    """The file a trainer is started with: the job's spec and where things lie on this host.

    The resumption point is the newest complete checkpoint folder in `OUT/checkpoints`, staged by the supervisor.
    """

    job_id: str
    model_name: str = Field(description="Name under which the adapter will be known (`ft:…`).")
    job: JobSpec
    base_model_path: str
    train_file: str = Field(description="Canonical JSONL (shared/rows/formats.py).")
    validation_file: str | None = None
    prepared_path: str | None = Field(default=None, description="The base in 4 bits; its name says which form.")
    parent_path: str | None = Field(default=None, description="The directory of the job's parent.")
    micro_batch_size: int = Field(ge=1, description="Rows per forward pass now; shrinks after out-of-memory.")
    pass_tokens: int | None = Field(default=None, ge=1, description="Most packed tokens of a pass, after the same.")
    gradient_checkpointing: bool = False
    gradient_checkpointing_layers: int | None = Field(default=None, ge=1, description="The first so many; null: all.")
    device: DeviceKind = "cpu"
    cpu_threads: int = Field(default=1, ge=1)
    memory_limit_bytes: int | None = Field(default=None, description="Refuse to grow past this; null: no limit.")
    packing_asked: bool = Field(default=False, description="The user asked for packing, so it may not be switched off.")
    keep_dequantized: bool = Field(
        default=False, description="Keep frozen 4-bit weights in 16 bits as well: the same numbers, less work per pass."
    )
    without: list[FastRoad] = Field(default_factory=list, description="Left out, to measure what each of them brings.")


class PreflightSpec(Part):
    """The file a preflight's program is started with."""

    job: JobSpec
    base_model_path: str
    train_file: str = Field(description="Canonical JSONL (shared/rows/formats.py).")
    validation_file: str | None = None
    preview_rows: list[int]
    processes: int = Field(default=1, ge=1)
    memory_bytes: int = Field(ge=1, description="Each process may gain so much beyond its libraries.")


class AutoValue(Part):
    """A value that the service chose, and why."""

    field: str
    value: Any
    reason: str
