"""/v1/tunepool/secrets: the credentials of a project's integrations."""

from __future__ import annotations

from fastapi import APIRouter

from api.body import RawBody, body_of, parse
from api.deps import DoorDep, ProjectOwner
from api.secret_bodies import StoreSecret
from api.views import secret_views, view
from shared.tenants import audit, outward, project_secrets
from shared.tenants.secret_box import SecretBox

router = APIRouter(prefix="/v1/tunepool/secrets", tags=["secrets"])


@router.get("", response_model=secret_views.SecretPage)
def list_secrets(caller: ProjectOwner, door: DoorDep) -> secret_views.SecretPage:
    """The names of the project's secrets. No route shows a value."""
    with door.session() as session:
        rows = project_secrets.listed(session, project_id=caller.project_id)
        return secret_views.SecretPage(data=[secret_views.secret(row) for row in rows])


@router.put("/{name}", response_model=secret_views.ProjectSecret, openapi_extra=body_of(StoreSecret))
def store_secret(name: str, caller: ProjectOwner, body: RawBody, door: DoorDep) -> secret_views.ProjectSecret:
    """Keep a value under a name, encrypted, in place of an earlier one."""
    name = project_secrets.checked_name(name)
    value = project_secrets.checked_value(parse(body, StoreSecret).value)
    if name == project_secrets.MLFLOW_TRACKING_URI:
        outward.target(value, allowed=outward.networks(door.settings.webhook_networks))
    box = SecretBox(door.settings)
    with door.session() as session:
        row = project_secrets.store(session, box, name, value, project_id=caller.project_id)
        audit.record(session, caller, "secret.store", name)
        return secret_views.secret(row)


@router.delete("/{name}", response_model=view.Deleted)
def remove_secret(name: str, caller: ProjectOwner, door: DoorDep) -> view.Deleted:
    """Forget a value. What needs it from now on fails, and is tried again for three days."""
    name = project_secrets.checked_name(name)
    with door.session() as session:
        project_secrets.remove(session, name, project_id=caller.project_id)
        audit.record(session, caller, "secret.remove", name)
    return view.Deleted(id=name, object="tunepool.secret")
