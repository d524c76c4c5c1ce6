"""/v1/tunepool/projects and keys: the tenants of the pool, and who may act for them."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Query

from api.body import RawBody, body_of, parse
from api.deps import Administrator, Door, DoorDep
from api.pool_bodies import CreateKey, CreateProject, EditKey, EditProject, RotateKey, changes
from api.views import pool_views
from shared.operating import administration
from shared.operating.overview import overview, standing
from shared.tenants import keys, projects, rotation
from shared.tenants.keys import Caller

router = APIRouter(prefix="/v1/tunepool", tags=["projects"])


@router.get("/projects", response_model=pool_views.ProjectPage)
def list_projects(caller: Administrator, door: DoorDep) -> pool_views.ProjectPage:
    """Every project with its rights and what it uses."""
    with door.session() as session:
        standings = overview(session, pool_name=door.settings.pool).standings
        return pool_views.ProjectPage(data=[pool_views.project(standing) for standing in standings])


@router.post("/projects", response_model=pool_views.Project, openapi_extra=body_of(CreateProject))
def create_project(caller: Administrator, body: RawBody, door: DoorDep) -> pool_views.Project:
    """A new project in the caller's organization."""
    wanted = changes(parse(body, CreateProject))
    with door.session() as session:
        project_id = projects.create(session, caller, **wanted).id
    return _project(door, project_id)


def _project(door: Door, project_id: str) -> pool_views.Project:
    with door.session() as session:
        return pool_views.project(standing(session, project_id, pool_name=door.settings.pool))


@router.get("/projects/{project_id}", response_model=pool_views.Project)
def retrieve_project(project_id: str, caller: Administrator, door: DoorDep) -> pool_views.Project:
    """One project with its rights and what it uses."""
    return _project(door, project_id)


@router.patch("/projects/{project_id}", response_model=pool_views.Project, openapi_extra=body_of(EditProject))
def edit_project(project_id: str, caller: Administrator, body: RawBody, door: DoorDep) -> pool_views.Project:
    """Change weight, guarantee, quotas, budgets or name; the next plan follows."""
    wanted = changes(parse(body, EditProject))
    with door.session() as session:
        projects.edit(session, caller, project_id, wanted)
    door.ring("training")
    return _project(door, project_id)


@router.post("/projects/{project_id}/hold", response_model=pool_views.Project)
def hold_project(project_id: str, caller: Administrator, door: DoorDep) -> pool_views.Project:
    """Start none of its jobs; what runs goes on."""
    return _hold(door, caller, project_id, held=True)


@router.post("/projects/{project_id}/release", response_model=pool_views.Project)
def release_project(project_id: str, caller: Administrator, door: DoorDep) -> pool_views.Project:
    """Start its jobs again."""
    return _hold(door, caller, project_id, held=False)


def _hold(door: Door, caller: Caller, project_id: str, *, held: bool) -> pool_views.Project:
    with door.session() as session:
        projects.set_held(session, caller, project_id, held=held)
    door.ring("training")
    return _project(door, project_id)


@router.get("/keys", response_model=pool_views.KeyPage)
def list_keys(
    caller: Administrator, door: DoorDep, project_id: Annotated[str | None, Query(max_length=100)] = None
) -> pool_views.KeyPage:
    """Keys of all projects or of one, revoked ones too. Secrets are not kept and not shown."""
    with door.session() as session:
        rows = keys.listed(session, project_id=project_id)
        former = rotation.former(session, [row.id for row in rows])
        return pool_views.KeyPage(data=[pool_views.key(row, former.get(row.id, ())) for row in rows])


@router.post("/keys", response_model=pool_views.NewKey, openapi_extra=body_of(CreateKey))
def create_key(caller: Administrator, body: RawBody, door: DoorDep) -> pool_views.NewKey:
    """A key for a project; the answer is the only place where its secret is ever seen."""
    wanted = parse(body, CreateKey)
    values = {"scopes": ["*"], **changes(wanted)}
    with door.session() as session:
        row, secret = administration.create_key(session, caller, project_id=wanted.project_id, **values)
        return pool_views.new_key(row, secret)


@router.patch("/keys/{key_id}", response_model=pool_views.Key, openapi_extra=body_of(EditKey))
def edit_key(key_id: str, caller: Administrator, body: RawBody, door: DoorDep) -> pool_views.Key:
    """Change a key's name, scopes, caps, bounds or end; its next request follows."""
    wanted = changes(parse(body, EditKey))
    with door.session() as session:
        row = administration.edit_key(session, caller, key_id, wanted)
        return pool_views.key(row, rotation.former(session, [key_id]).get(key_id, ()))


@router.post("/keys/{key_id}/rotate", response_model=pool_views.NewKey, openapi_extra=body_of(RotateKey))
def rotate_key(key_id: str, caller: Administrator, body: RawBody, door: DoorDep) -> pool_views.NewKey:
    """A new secret for a key, whose id, rights and figures stay. The answer is the only place where it is ever seen.

    The secret until now stays valid for `overlap_hours`; with 0 it ends at once, and older ones with it.
    """
    overlap = timedelta(hours=parse(body, RotateKey).overlap_hours)
    with door.session() as session:
        row, secret = administration.rotate_key(session, caller, key_id, overlap=overlap)
        return pool_views.new_key(row, secret, rotation.former(session, [key_id]).get(key_id, ()))


@router.delete("/keys/{key_id}", response_model=pool_views.Key)
def revoke_key(key_id: str, caller: Administrator, door: DoorDep) -> pool_views.Key:
    """End a key at once."""
    with door.session() as session:
        return pool_views.key(administration.revoke_key(session, caller, key_id))
