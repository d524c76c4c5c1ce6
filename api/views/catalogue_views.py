"""Views of base models, for the people who run an installation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from api.views.view import View, seconds
from shared.contract.model_description import ModelDescription
from shared.settle.base_model_status import BaseModelStatus, Origin, State
from shared.store.tables import FetchRow


class BaseModelSizes(View):
    """Counted from the headers of the weights; where there are none, from config.json."""

    architecture: str
    parameters: int
    active_parameters: int | None = Field(description="Those that one token passes through. null: not known.")
    expert_parameters: int | None = Field(description="Of the experts that a router chooses among. null: not known.")
    stored_as: str | None = Field(description="Type of most weights, or a quantised form. null: not known.")
    max_position_embeddings: int
    tie_word_embeddings: bool


class BaseModelView(View):
    id: str = Field(description="The name that jobs use.", examples=["qwen3-8b"])
    object: Literal["tunepool.base_model"] = "tunepool.base_model"
    state: State
    detail: str | None = Field(description="What holds it up, or what to do.")
    origin: Origin = Field(description="Only `added` ones are removed here.")
    source: str | None = Field(description="hub, path or pypi. null: an entry of models.toml that is not understood.")
    locator: str | None = Field(
        description="The repository or the folder.", examples=["meta-llama/Llama-3.1-8B-Instruct"]
    )
    revision: str | None = Field(description="As it was asked for: a branch, a tag or a commit.", examples=["main"])
    commit: str | None = Field(description="Pinned when it was looked up first; a branch that moves changes nothing.")
    aliases: list[str] = Field(description="Further names that jobs may use.")
    created_at: int
    looked_at: int | None = Field(description="When a worker looked at it last. null: not yet, or nothing to look at.")
    sizes: BaseModelSizes | None = Field(description="null: not known yet.")
    description: ModelDescription | None = Field(
        description="What its chat template writes, and how it is built, as a program of the trainer found it in its "
        "config and tokenizer. null: not known, such as of the built-in model."
    )


class FetchView(View):
    """One worker's prefetch of a base model."""

    object: Literal["tunepool.fetch"] = "tunepool.fetch"
    worker_id: str
    host: str
    state: Literal["waiting", "fetching", "done", "error"]
    bytes_done: int
    bytes_total: int = Field(description="Estimated until it is there. 0: not begun.")
    detail: str | None = Field(description="What holds it up, or what to do.")
    updated_at: int


class FetchPage(View):
    object: Literal["list"] = "list"
    data: list[FetchView]


class BaseModelPage(View):
    object: Literal["list"] = "list"
    data: list[BaseModelView]
    file_problem: str | None = Field(description="Why models.toml is left out as a whole; null: it is read.")


def base_model(standing: BaseModelStatus) -> BaseModelView:
    sizes = None if standing.facts is None else standing.facts.model_dump(include=set(BaseModelSizes.model_fields))
    return BaseModelView(
        id=standing.name,
        state=standing.state,
        detail=standing.detail,
        origin=standing.origin,
        source=standing.source,
        locator=standing.locator,
        revision=standing.revision,
        commit=standing.commit,
        aliases=list(standing.aliases),
        created_at=standing.created,
        looked_at=standing.looked_at,
        sizes=None if sizes is None else BaseModelSizes.model_validate(sizes),
        description=standing.description,
    )


def fetch(row: FetchRow, host: str) -> FetchView:
    return FetchView.model_validate(
        {
            "worker_id": row.worker_id,
            "host": host,
            "state": row.state,
            "bytes_done": row.bytes_done,
            "bytes_total": row.bytes_total,
            "detail": row.error,
            "updated_at": seconds(row.updated_at),
        }
    )
