"""Groups of settings that `shared/settings.py` inherits: the page, training together, clusters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings

# As long as what `openssl rand -hex 16` prints.
PROXY_SECRET_CHARACTERS: Final = 32
# As browsers write it (RFC 6454, 6.2): in lower case, an IPv6 address in brackets.
_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?")


class PageSettings(BaseSettings):
    """Settings for browsers: our page's sign-ins, a proxy that vouches for who is there, and pages of others."""

    page_idle_seconds: int = Field(
        default=8 * 3600, ge=60, description="A browser that asks nothing for so long is signed out of the page."
    )
    page_sign_in_seconds: int = Field(
        default=7 * 86400, ge=60, description="A browser signs in to the page again after this, whatever it does."
    )
    page_proxy_header: str = Field(
        default="",
        pattern=r"^([A-Za-z][A-Za-z0-9-]{0,99})?$",
        description="Header in which a proxy names who has signed in there; empty: nobody signs in by a proxy.",
    )
    page_proxy_secret: SecretStr = Field(
        default=SecretStr(""),
        description="What the proxy sends as X-Tunepool-Proxy-Secret, 32 characters or more; belongs to the header.",
    )

    cors_origins: str = Field(
        default="",
        description="Origins whose pages may ask the API from a browser, https://app.example.com, with commas; "
        "*: any; empty: none.",
    )

    @field_validator("cors_origins")
    @classmethod
    def _origins_are_origins(cls, text: str) -> str:
        for origin in _parts(text):
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"TUNEPOOL_CORS_ORIGINS names '{origin}'; an origin is https://host[:port] in lower case, without a"
                    " path"
                )
        return text

    @property
    def allowed_origins(self) -> frozenset[str]:
        return frozenset(_parts(self.cors_origins))

    def refuse_half_a_proxy(self) -> None:
        """Raises ValueError. The API asks at its start; other processes may know the header alone, and need neither.

        A header alone would let anybody who reaches the API's port sign in as anybody.
        """
        secret = self.page_proxy_secret.get_secret_value()
        if bool(self.page_proxy_header) != bool(secret):
            raise ValueError("TUNEPOOL_PAGE_PROXY_HEADER and TUNEPOOL_PAGE_PROXY_SECRET go together: set both or none")
        if secret and len(secret) < PROXY_SECRET_CHARACTERS:
            raise ValueError(f"TUNEPOOL_PAGE_PROXY_SECRET needs {PROXY_SECRET_CHARACTERS} characters at least")


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


class CotrainingSettings(BaseSettings):
    """Settings of jobs that train together on one base in memory (docs/scheduling.md)."""

    cotraining: Literal["off", "project", "any"] = Field(
        default="off",
        description="Whether small jobs that wait share a device and one base model in memory: off; project, those of "
        "one project; any, of all projects, whose rows are then in one process (docs/scheduling.md).",
    )
    cotraining_jobs: int = Field(default=4, ge=2, le=8, description="Jobs that train together at most.")
    cotraining_seconds: float = Field(
        default=900.0, gt=0, description="No job with a longer forecast trains together with others."
    )
    cotrainer: str = Field(
        default="worker.train.together", description="Module run for jobs that train together; tests name another."
    )


class ClusterSettings(BaseSettings):
    """Settings of pools whose machines are a cluster's (docs/slurm.md, docs/kubernetes.md)."""

    launcher: Literal["local", "slurm", "kubernetes"] = Field(
        default="local",
        description="Who gives the machines: this host, or a cluster that a dispatcher asks (docs/slurm.md, "
        "docs/kubernetes.md).",
    )
    cluster_nodes: int = Field(
        default=1, ge=1, le=4096, description="Nodes of a cluster that jobs of this pool may ask for at once."
    )
    cluster_node_devices: int = Field(default=1, ge=1, le=64, description="Devices of each of these nodes.")
    cluster_device_kind: Literal["cuda", "rocm", "cpu"] = Field(default="cuda", description="What they are.")
    cluster_device_name: str = Field(
        default="GPU of the cluster", min_length=1, max_length=100, description="Their name, as drivers tell it."
    )
    cluster_device_bytes: int | None = Field(
        default=None, ge=1, description="Memory of each of them; a dispatcher does not start without it."
    )
    cluster_device_capability: int | None = Field(
        default=None, ge=10, le=999, description="NVIDIA's compute capability of them: 90 is 9.0."
    )
    cluster_look_seconds: float = Field(default=10.0, gt=0, description="How often a dispatcher looks at its cluster.")
    cluster_command_seconds: float = Field(default=30.0, gt=0, description="A cluster that answers later is away.")
    cluster_start_seconds: float = Field(
        default=900.0, gt=0, description="From the cluster's start of an attempt until its worker reports."
    )
    slurm_bin: Path | None = Field(default=None, description="Folder of sbatch, squeue …; empty: PATH.")
    slurm_options: str = Field(
        default="", description="Further options of sbatch: --partition=gpu --time=24:00:00 --output=/logs/%x.%j.log"
    )
    slurm_gres: str = Field(
        default="gpu:{count}",
        pattern=r"^[^\s]*\{count\}$",
        description="What is asked of Slurm for GPUs, such as gpu:a100:{count}.",
    )
    slurm_setup: str = Field(
        default="",
        pattern=r"^(/[^\s'\"]+)?$",
        description="File on the nodes that sets DATABASE_URL, STORAGE_URL …; the batch script reads it first.",
    )
    slurm_command: str = Field(
        default="tunepool-server", min_length=1, description="tunepool-server on the nodes, its path or more words."
    )
    kubernetes_url: str = Field(
        default="https://kubernetes.default.svc", pattern=r"^https?://[^\s]+$", description="The API server."
    )
    kubernetes_namespace: str = Field(
        default="default", pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$", description="Where its Jobs are made."
    )
    kubernetes_job: Path | None = Field(
        default=None, description="JSON file with the Job that each attempt is made of (docs/kubernetes.md)."
    )
    kubernetes_queue: str = Field(
        default="",
        pattern=r"^([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)?$",
        description="Kueue's LocalQueue for them; empty: no Kueue.",
    )
    kubernetes_resource: str = Field(default="nvidia.com/gpu", min_length=1, description="Asked for as devices.")
