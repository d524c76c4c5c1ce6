"""Every setting, typed, with its unit in its name. The only reader of the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from ipaddress import ip_network
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import SettingsConfigDict

from shared.setting_groups import ClusterSettings, CotrainingSettings, PageSettings


class Settings(PageSettings, CotrainingSettings, ClusterSettings):
    """Settings come from the environment; names are upper case, ours begin with TUNEPOOL_."""

    model_config = SettingsConfigDict(env_prefix="TUNEPOOL_", extra="ignore", populate_by_name=True)

    home: Path = Field(default=Path(".tunepool"), description="State of this host: caches, work folders, logs.")
    database_url: str = Field(default="", validation_alias="DATABASE_URL", description="postgresql+psycopg://…")
    redis_url: str = Field(default="", validation_alias="REDIS_URL", description="redis://… or redis+socket:///path")
    storage_url: str = Field(
        default="", validation_alias="STORAGE_URL", description="file:///path, s3://bucket/prefix, gs://…, az://…"
    )
    storage_endpoint: str = Field(default="", description="Endpoint of an S3-compatible server; empty: AWS.")
    storage_region: str = Field(default="us-east-1", description="Region of the bucket.")
    storage_access_key: SecretStr | None = Field(
        default=None, description="Empty: what the environment of the cloud says, such as an instance's role."
    )
    storage_secret_key: SecretStr | None = Field(default=None, description="Belongs to the access key.")

    public_url: str = Field(default="", description="Base URL of clients, for signed links; empty: from the request.")
    signing_secret: SecretStr = Field(
        default=SecretStr(""), description="Signs download links of the local store; empty: made at first start."
    )
    secrets_key: SecretStr = Field(
        default=SecretStr(""),
        description="Encrypts stored secrets; further keys behind commas decrypt older ones; empty: none are stored.",
    )
    provenance_key_file: Path | None = Field(
        default=None,
        description="PEM file of the ed25519 key that signs where adapters come from; empty: one that the database "
        "keeps, encrypted.",
    )
    webhook_networks: str = Field(
        default="",
        description="Private networks that webhooks may go to, such as 10.0.0.0/8, with commas; http:// is for these.",
    )
    webhook_seconds: float = Field(default=10.0, gt=0, le=60, description="A webhook's answer takes no longer.")
    oidc_issuers: str = Field(
        default="https://token.actions.githubusercontent.com,https://gitlab.com",
        description="Issuers whose ID tokens rules may name, with commas; empty: none.",
    )
    oidc_networks: str = Field(
        default="", description="Private networks that such issuers may be in, with commas; http:// is for these."
    )
    wandb_url: str = Field(default="https://api.wandb.ai", description="Weights & Biases server that tracks jobs.")
    tracker_seconds: float = Field(
        default=30.0, gt=0, le=3600, description="A running job's figures are brought to its trackers so often."
    )
    push_url: str = Field(default="", description="Hub that projects may push to, by its address; empty: none.")
    link_seconds: int = Field(default=900, ge=1, description="Life of a download link.")

    max_file_bytes: int = Field(default=512 * 1024 * 1024, ge=1, description="Largest upload.")
    max_upload_bytes: int = Field(default=8 * 1024**3, ge=1, description="Largest file that comes in parts.")
    upload_seconds: float = Field(default=3600.0, gt=0, description="An upload in parts that is open so long expires.")
    max_body_bytes: int = Field(default=1024 * 1024, ge=1, description="Largest JSON body.")
    project_bytes: int = Field(
        default=2**40,
        ge=0,
        description="Bytes of files that a project may keep, where it has no limit of its own; 0: any.",
    )
    project_files: int = Field(
        default=100_000, ge=0, description="Files that a project may keep, where it has no limit of its own; 0: any."
    )
    key_requests_per_minute: int = Field(default=60_000, ge=0, description="Requests of one API key; 0: any number.")
    project_requests_per_minute: int = Field(default=120_000, ge=0, description="Requests of a project; 0: any number.")
    failed_keys_per_minute: int = Field(
        default=600, ge=0, description="Requests of one address with keys that are none; 0: any number."
    )
    api_processes: int = Field(default=1, ge=1, le=64, description="Processes that serve the API's port.")
    max_streams: int = Field(default=1000, ge=1, description="Event streams that one API process sends at once.")
    stream_seconds: float = Field(default=900.0, gt=0, description="After so long a stream's client comes again.")
    min_training_rows: int = Field(default=10, ge=1, description="OpenAI's lower bound on examples.")

    pool: str = Field(default="default", pattern=r"^[a-z0-9_-]{1,40}$", description="Pool that this process serves.")
    heartbeat_seconds: float = Field(
        default=10.0,
        gt=0,
        le=30,
        description="How often a worker extends its leases and reports its devices; after 60 s of silence the plan "
        "does without them.",
    )
    control_seconds: float = Field(default=1.0, gt=0, description="How often a supervisor looks for cancel and pause.")
    lease_seconds: float = Field(default=60.0, gt=0, description="How long a lease lasts without a heartbeat.")
    reap_seconds: float = Field(default=5.0, gt=0, description="How often the janitor looks for dead leases.")
    grace_seconds: float = Field(default=15.0, ge=0, description="A lease is dead this long after its end.")
    sweep_seconds: float = Field(default=15.0, gt=0, description="How often the janitor rings for waiting work.")
    stop_seconds: float = Field(
        default=30.0,
        gt=0,
        description="From asking a trainer to stop until it is killed; two of its steps, where those are longer.",
    )
    blind_seconds: float = Field(default=600.0, gt=0, description="So long without Postgres: checkpoint and stop.")
    stall_factor: float = Field(default=10.0, gt=1, description="No step for this many median steps: stuck.")
    stall_floor_seconds: float = Field(default=300.0, gt=0, description="No attempt is called stuck sooner.")
    max_attempts: int = Field(default=3, ge=1, description="Counted attempts of a job before it fails.")
    backoff_base_seconds: float = Field(
        default=30.0, ge=0, description="First back-off after a counted attempt; it doubles, with full jitter."
    )
    backoff_cap_seconds: float = Field(default=900.0, ge=0, description="Longest back-off.")
    deaf_seconds: float = Field(
        default=30.0,
        gt=0,
        description="Work waits, no bell comes, Redis answers: a worker starts afresh after this and two sweeps.",
    )
    ring_seconds: float = Field(default=0.2, gt=0, description="Budget for waking a worker.")

    trainer: str = Field(default="worker.train", description="Module run as the trainer; tests name the fake one.")
    keep_warm: Literal["off", "imports", "base"] = Field(
        default="imports",
        description="What waits for a job at each idle device, and for the next evaluation, where memory allows: "
        "imports, a program that has loaded its libraries; base, one that holds the last job's base model too, if it "
        "waits for a job (docs/trainer.md); off, nothing.",
    )
    describer: str = Field(
        default="worker.train.description", description="Module run to describe a base model; empty: none is described."
    )
    preflight: str = Field(default="worker.train.preflight", description="Module run to examine a job's rows.")
    preflight_seconds: float = Field(default=900.0, gt=0, description="A longer examination is ended.")
    preflight_memory_bytes: int = Field(default=2 * 1024**3, ge=1, description="Of each process of an examination.")
    merge_memory_bytes: int | None = Field(default=None, ge=1, description="Memory of a merge or export; empty: 80 %.")
    merger: str = Field(default="worker.train.merge", description="Module run for a merge; tests name another.")
    exporter: str = Field(default="worker.train.to_gguf", description="Module run for an export.")
    combiner: str = Field(default="worker.train.combine", description="Module run for a combination.")
    evaluator: str = Field(default="worker.train.evaluate", description="Module run for an evaluation.")
    evaluation_turn_seconds: float = Field(
        default=600.0, gt=0, description="After so long an evaluation makes room for other long work that waits."
    )
    playground: str = Field(default="worker.train.playground", description="Module run to answer questions.")
    playground_address: str = Field(
        default="127.0.0.1",
        min_length=1,
        max_length=255,
        description="Address that this host's playground listens on, and that the API reaches it at.",
    )
    playground_idle_seconds: float = Field(
        default=600.0, gt=0, description="A playground that nobody asks lets its base model go after this."
    )
    playground_wait_seconds: float = Field(
        default=60.0, gt=0, description="A question that has no beginning of an answer by then is refused with a 503."
    )
    playground_queue: int = Field(default=64, ge=1, le=10_000, description="Questions a playground has at once.")
    playground_answer_tokens: int = Field(default=1024, ge=1, description="Longest answer where no length is named.")
    playground_context_tokens: int = Field(
        default=8192, ge=1, description="Prompt and answer together at the most; less where the base takes less."
    )
    vllm_url: str = Field(
        default="",
        pattern=r"^(https?://[^/?#\s@]+(/v1)?/?)?$",
        description="A vLLM server that answers what it can serve, http://host:8000; empty: there is none.",
    )
    vllm_key: SecretStr = Field(default=SecretStr(""), description="The vLLM server's own API key.")
    vllm_adapters: Path | None = Field(
        default=None,
        description="Folder that the API writes adapters to and vLLM reads them from, under this very path; "
        "empty: vllm in the home.",
    )
    trainer_uid: int | None = Field(
        default=None,
        ge=0,
        description="User that trainers run as when the worker is root; 0: root; empty: one of nobody's.",
    )
    trainer_env: str = Field(
        default="",
        pattern=r"^([A-Za-z_][A-Za-z0-9_]*\*?(\s*,\s*|$))*$",
        description="Further variables that trainers get, by name with commas; NAME_* stands for all that begin so, "
        "except for what looks like a credential.",
    )
    isolation: Literal["require", "best", "off"] = Field(
        default="best",
        description="Walls around programs on strangers' data (docs/security.md): require refuses to start a worker "
        "where the host cannot give them, best takes what there is and says so, off builds none.",
    )
    gang_launcher: str = Field(
        default="worker.train.gang", description="Module that starts the ranks of a host; tests name the fake one."
    )
    gang_address: str = Field(
        default="",
        max_length=255,
        description="Address of this host for the other hosts of a job; empty: the one it reaches the database from.",
    )
    gang_ports: str = Field(
        default="",
        pattern=r"^(\d{1,5}-\d{1,5})?$",
        description="Ports at which the hosts of a job meet, for firewalls, such as 29500-29599; empty: any free one.",
    )
    models_file: Path | None = Field(default=None, description="TOML with more base models and aliases.")
    cache_dir: Path | None = Field(
        default=None,
        description="Where fetched base models lie; workers of one host that name one folder share each fetch. Empty: "
        "HOME/cache.",
    )
    cache_bytes: int | None = Field(
        default=None, ge=1, description="Disk that fetched base models may take on a host; empty: no bound."
    )
    devices: str = Field(default="all", min_length=1, description="This worker's devices: all, cpu, uuids or indices.")
    visible_gpus: str | None = Field(
        default=None,
        validation_alias="CUDA_VISIBLE_DEVICES",
        description="NVIDIA GPUs that this worker may use, as CUDA reads it: uuids, or indices in the order of "
        "nvidia-smi; -1 hides all. Empty: every one.",
    )
    cpu_slots: int = Field(default=1, ge=1, le=256, description="Jobs at a time on the CPU, which share it equally.")
    cpu_threads: int | None = Field(default=None, ge=1, description="Threads of CPU trainers; empty: all cores.")
    cpu_memory_bytes: int | None = Field(default=None, ge=1, description="Memory the CPU offers; empty: 80 % of RAM.")
    cpu_probe: bool = Field(
        default=True, description="Time the CPU's products once, to choose between bfloat16 and float32; else by flags."
    )
    cpu_instructions: str = Field(
        default="",
        validation_alias="ONEDNN_MAX_CPU_ISA",
        description="Newest instructions that training on a CPU uses, such as AVX2; empty: all it has.",
    )
    failpoint: str = Field(
        default="",
        pattern=r"^([a-z_]+:(exit|freeze)(:once)?)?$",
        description="For fault tests: the edge at which a process dies or freezes (shared/failpoints.py).",
    )
    log_json: bool = Field(default=False, description="Logs as JSON lines.")

    @field_validator(
        *("models_file", "cache_dir", "cache_bytes", "vllm_adapters", "provenance_key_file"),
        *("slurm_bin", "kubernetes_job", "cluster_device_bytes", "cluster_device_capability"),
        mode="before",
    )
    @classmethod
    def _empty_is_unset(cls, value: object) -> object:
        """Compose passes variables that nobody set as empty ones; `Path("")` would be the current folder."""
        return None if value == "" else value

    @field_validator("webhook_networks", "oidc_networks")
    @classmethod
    def _networks_are_networks(cls, text: str) -> str:
        for part in text.split(","):
            if part.strip():
                ip_network(part.strip())  # raises ValueError, whose words name the part
        return text

    @field_validator("oidc_issuers")
    @classmethod
    def _issuers_are_urls(cls, text: str) -> str:
        for issuer in filter(None, (part.strip() for part in text.split(","))):
            if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", issuer):
                raise ValueError(f"TUNEPOOL_OIDC_ISSUERS names '{issuer}'; an issuer is https://host[/path]")
        return text

    @field_validator("gang_ports")
    @classmethod
    def _ports_are_a_range(cls, ports: str) -> str:
        low, _, high = ports.partition("-")
        if ports and not 1 <= int(low) <= int(high) <= 65535:
            raise ValueError(f"TUNEPOOL_GANG_PORTS is '{ports}'; give the lower port first, both from 1 to 65535")
        return ports

    @property
    def vllm_folder(self) -> Path:
        """Where the API puts adapters for a vLLM server."""
        return self.vllm_adapters or self.home.resolve() / "vllm"

    @property
    def storage(self) -> str:
        """The store's URL; the local folder of this home when none is set."""
        return self.storage_url or f"file://{self.home.resolve() / 'storage'}"

    @property
    def cache(self) -> Path:
        return self.home.resolve() / "cache" if self.cache_dir is None else self.cache_dir.resolve()


def child_environment(**overrides: str) -> dict[str, str]:
    """The environment of a child that is one of us: ours, with `overrides` on top."""
    return {**os.environ, **overrides}


_PROGRAM_KEEPS: Final = frozenset(
    {"PATH", "HOME", "USER", "LOGNAME", "LD_LIBRARY_PATH", "TZ", "KRB5CCNAME", "SLURM_CONF", "SLURM_CONF_SERVER"}
)


def program_environment() -> dict[str, str]:
    """The environment of a cluster's programs, such as sbatch: how they are set up, and no secret of ours."""
    kept = {name: value for name, value in os.environ.items() if name in _PROGRAM_KEEPS}
    return {**kept, "LC_ALL": "C"}


# What a trainer may know. No URL, no key, no token: it reads files and writes files.
_TRAINER_KEEPS: Final = frozenset(
    {
        *("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "TMPDIR", "VIRTUAL_ENV", "CC"),
        *("CUDA_HOME", "CUDA_DEVICE_ORDER", "CUDA_MODULE_LOADING", "ROCM_PATH", "ONEDNN_MAX_CPU_ISA"),
        *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"),
    }
)
# How GPUs and hosts talk to each other is the host's affair: NCCL_P2P_DISABLE, NCCL_IB_HCA, FI_PROVIDER (EFA) …
_TRAINER_PREFIXES: Final = ("NCCL_", "TORCH_NCCL_", "RCCL_", "FI_", "UCX_", "GLOO_", "HSA_")
_CREDENTIALS: Final = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL")
_TRAINER_ENV: Final = "TUNEPOOL_TRAINER_ENV"
# Never, whatever TUNEPOOL_TRAINER_ENV names.
_OURS: Final = re.compile(r"TUNEPOOL_|DATABASE_URL$|REDIS_URL$|STORAGE_URL$|HF_TOKEN$|HUGGING_FACE_HUB_TOKEN$")


def trainer_environment(**overrides: str) -> dict[str, str]:
    """A scrubbed environment for a trainer: no credentials, no hub."""
    wanted = [name.strip() for name in os.environ.get(_TRAINER_ENV, "").split(",")]
    kept = {name: value for name, value in os.environ.items() if _reaches_trainers(name, wanted)}
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        # The owner of a job reads what it prints. A progress bar is a line for each of its states there, and the
        # stack's advice to those who program with it helps nobody.
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        **overrides,
    }


def _reaches_trainers(name: str, wanted: Collection[str]) -> bool:
    """Whether a variable is passed on. What looks like a credential must be named in full by the operator."""
    if _OURS.match(name):
        return False
    if name in _TRAINER_KEEPS or name in wanted:
        return True
    prefixes = (*_TRAINER_PREFIXES, *(pattern[:-1] for pattern in wanted if len(pattern) > 1 and pattern.endswith("*")))
    return name.startswith(prefixes) and _CREDENTIALS.search(name) is None


def open_telemetry_variables() -> dict[str, str]:
    """OpenTelemetry's standard variables. One that is empty counts as unset, as its specification says."""
    return {name: value for name, value in os.environ.items() if name.startswith("OTEL_") and value}
