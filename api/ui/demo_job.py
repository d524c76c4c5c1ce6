"""/ui/demo: a first job for a newcomer who has no data at hand."""

from __future__ import annotations

import hashlib
import json
from typing import Final

from fastapi import APIRouter, Response

from api.deps import DoorDep
from api.routes import catalogue as catalogue_routes
from api.routes import files as file_routes
from api.routes import jobs as job_routes
from api.ui import visits
from api.ui.visits import JobsOrderer, ProvenForm
from shared.errors import Unavailable
from shared.ids import new_id
from shared.products.files import Upload
from shared.store import layout

router = APIRouter(prefix="/ui/demo", route_class=visits.PageRoute, include_in_schema=False)

_QUEUES: Final = {
    "shipping": ("My parcel has not arrived.", "The courier left it with a stranger.", "When will order 114 be sent?"),
    "billing": ("I was charged twice.", "The invoice has the wrong name.", "My refund has not come."),
    "account": ("I cannot sign in.", "Please delete my account.", "The code never reaches my phone."),
    "product": ("The lamp arrived broken.", "A part is missing in the box.", "The shirt is too small."),
    "praise": ("Best shop in town!", "Your people were so kind.", "That was quick, thank you."),
}


def rows() -> bytes:
    """Thirty tickets, each with the queue that it belongs to."""
    asked = "Name the queue of this ticket: shipping, billing, account, product or praise."
    lines = [
        {
            "messages": [
                {"role": "system", "content": asked},
                {"role": "user", "content": f"{opening}{text}"},
                {"role": "assistant", "content": queue},
            ]
        }
        for opening in ("", "Hello, ")
        for queue, texts in _QUEUES.items()
        for text in texts
    ]
    return "\n".join(json.dumps(line) for line in lines).encode()


@router.post("")
def start_demo(door: DoorDep, visit: JobsOrderer, form: ProvenForm) -> Response:
    """Bring the rows, and train the smallest base model that is ready. Raises Unavailable when there is none."""
    caller = visit.caller
    caller.must("files:write")
    caller.must("models:read")
    ready = [base for base in catalogue_routes.list_base_models(door, caller).data if base.state == "ready"]
    if not ready:
        raise Unavailable("No base model is ready yet. Try again once one is.", code="no_model_ready")
    smallest = min(ready, key=lambda base: base.sizes.parameters if base.sizes is not None else 0)
    file_id, content = new_id("file-"), rows()
    key = layout.file_key(caller.project_id, file_id)
    door.store.put_bytes(key, content)
    upload = Upload(
        id=file_id,
        filename="tickets.jsonl",
        purpose="fine-tune",
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        key=key,
        expires_after=None,
        packed=False,
    )
    file_routes.keep(door, caller, upload)
    body = {"model": smallest.id, "training_file": file_id, "suffix": "demo"}
    job, _ = job_routes.submitted(door, caller, json.dumps(body).encode())
    return visits.back(f"/ui/jobs/{job.id}")
