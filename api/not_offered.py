"""Routes of OpenAI that Tunepool lacks, each with what to use instead.

A script that was written for OpenAI meets them. "Unknown request URL" would make its owner look for a typing error.
"""

from __future__ import annotations

from typing import Final

_ASK: Final = "Ask models by POST /v1/chat/completions, or serve the adapter with an inference server such as vLLM."
_PROJECTS: Final = "Projects and keys are under /v1/tunepool/projects and /v1/tunepool/keys."
_KEPT: Final = "Answers are not kept here: there is nothing to list, change or delete."
# The longest prefix that fits a path decides. A route that the application has is never looked up here.
NOT_OFFERED: Final = {
    "/v1/chat/completions": _KEPT,
    "/v1/completions": _KEPT,
    "/v1/responses": _ASK,
    "/v1/conversations": _ASK,
    "/v1/assistants": _ASK,
    "/v1/threads": _ASK,
    "/v1/realtime": _ASK,
    "/v1/live": _ASK,
    "/v1/agents": _ASK,
    "/v1/chatkit": _ASK,
    "/v1/skills": _ASK,
    "/v1/vaults": _ASK,
    "/v1/decisions": _ASK,
    "/v1/embeddings": "Use an embedding server.",
    "/v1/moderations": "Use a moderation service; rows are not moderated here.",
    "/v1/safety": "Use a moderation service; rows are not moderated here.",
    "/v1/content_provenance_checks": "Where an adapter comes from is told by GET /v1/tunepool/adapters/{name}.",
    "/v1/images": "Language models only are trained here.",
    "/v1/audio": "Language models only are trained here.",
    "/v1/videos": "Language models only are trained here.",
    "/v1/batches": "Send single requests to the server of your adapter.",
    "/v1/vector_stores": "Training files need no index: upload them by POST /v1/files.",
    "/v1/containers": "No code of others is run here.",
    "/v1/webhook_endpoints": "Webhooks of a project are under /v1/tunepool/webhooks.",
    "/v1/webhook_event_types": "Webhooks of a project are under /v1/tunepool/webhooks.",
    "/v1/fine-tunes": "It ended with OpenAI's first fine-tuning API: use /v1/fine_tuning/jobs.",
    "/v1/engines": "It ended at OpenAI: use GET /v1/models.",
    "/v1/edits": "It ended at OpenAI: use POST /v1/chat/completions.",
    "/v1/organization": _PROJECTS,
    "/v1/projects": _PROJECTS,
}
# Methods of OpenAI's that a path which the application has lacks.
METHODS_NOT_OFFERED: Final = {("GET", "/v1/chat/completions"): _KEPT}


def instead_of_method(method: str, path: str) -> str | None:
    """The same for a method that the application does not have at `path`, where OpenAI has it."""
    return METHODS_NOT_OFFERED.get((method, path.rstrip("/")))


def instead_of(path: str) -> str | None:
    """What to use instead of the OpenAI route at `path`; None where OpenAI has no such route."""
    fitting = [prefix for prefix in NOT_OFFERED if path == prefix or path.startswith(f"{prefix}/")]
    return NOT_OFFERED[max(fitting, key=len)] if fitting else None
