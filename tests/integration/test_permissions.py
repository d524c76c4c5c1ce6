"""A project lets another one of its organization use a model: exactly that model and project, until it is revoked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import openai
import pytest
from openai import OpenAI

from shared.ids import new_id
from shared.products import adapters
from shared.store.db import session_scope
from shared.store.tables import ProjectRow
from shared.tenants import keys
from tests.factories import make_key
from tests.integration.conftest import Api
from tests.integration.test_access import trained
from tests.openai_types import held


@dataclass(frozen=True)
class Sharing:
    """A tuned model of ours, a checkpoint of it, and who might want them."""

    model: str
    checkpoint: str
    admin: OpenAI
    friend: OpenAI
    friend_id: str


@pytest.fixture(scope="module")
def place(api: Api) -> Iterator[Sharing]:
    model, checkpoint = trained(api)
    with session_scope(api.engine) as session:
        friend = ProjectRow(id=new_id("proj_"), organization_id=api.caller.organization_id, name="friends")
        session.add(friend)
        session.flush()
        friend_id = friend.id
        _, secret = keys.create(session, project_id=friend_id, name="theirs", scopes=("*",))
        _, admin = keys.create(session, project_id=api.caller.project_id, name="admin", scopes=keys.EVERYTHING)
    with (
        OpenAI(base_url=f"{api.url}/v1", api_key=admin, max_retries=0, http_client=held()) as operator,
        OpenAI(base_url=f"{api.url}/v1", api_key=secret, max_retries=0, http_client=held()) as other,
    ):
        yield Sharing(model, checkpoint, operator, other, friend_id)


def granted(place: Sharing, name: str) -> str:
    page = place.admin.fine_tuning.checkpoints.permissions.create(name, project_ids=[place.friend_id])
    (permission,) = page.data
    assert (permission.object, permission.project_id) == ("checkpoint.permission", place.friend_id)
    return permission.id


def test_a_permission_opens_one_model_to_one_project_until_it_is_deleted(
    api: Api, place: Sharing, stranger: str
) -> None:
    permissions = place.admin.fine_tuning.checkpoints.permissions
    with pytest.raises(openai.NotFoundError):
        place.friend.models.retrieve(place.model)

    permission = granted(place, place.model)
    assert granted(place, place.model) == permission  # twice is the same
    assert place.friend.models.retrieve(place.model).id == place.model
    assert place.model in [model.id for model in place.friend.models.list()]
    with pytest.raises(openai.NotFoundError):
        place.friend.models.retrieve(place.checkpoint)
    with (
        OpenAI(base_url=f"{api.url}/v1", api_key=stranger, max_retries=0, http_client=held()) as theirs,
        pytest.raises(openai.NotFoundError),
    ):
        theirs.models.retrieve(place.model)
    with pytest.raises(openai.NotFoundError):
        place.friend.models.delete(place.model)

    gone = permissions.delete(permission, fine_tuned_model_checkpoint=place.model)
    assert (gone.id, gone.object, gone.deleted) == (permission, "checkpoint.permission", True)
    with pytest.raises(openai.NotFoundError):
        place.friend.models.retrieve(place.model)
    assert place.model not in [model.id for model in place.friend.models.list()]


def test_a_shared_checkpoint_can_be_asked_and_made_products_of(api: Api, place: Sharing) -> None:
    permission = granted(place, place.checkpoint)

    with session_scope(api.engine) as session:
        source = adapters.find_source(session, place.checkpoint, project_id=place.friend_id)
        assert source.adapter.name == place.checkpoint
    assert place.friend.models.retrieve(place.checkpoint).id == place.checkpoint
    place.admin.fine_tuning.checkpoints.permissions.delete(permission, fine_tuned_model_checkpoint=place.checkpoint)


def test_permissions_are_listed_in_pages_and_by_project(api: Api, place: Sharing) -> None:
    permissions = place.admin.fine_tuning.checkpoints.permissions
    with session_scope(api.engine) as session:
        ids = [new_id("proj_") for _ in range(3)]
        for project_id in ids:
            session.add(ProjectRow(id=project_id, organization_id=api.caller.organization_id, name=project_id))

    made = permissions.create(place.model, project_ids=ids).data
    assert [row.project_id for row in made] == ids
    assert [row.id for row in permissions.list(place.model, limit=2)] == [row.id for row in reversed(made)]
    assert [row.id for row in permissions.list(place.model, order="ascending")] == [row.id for row in made]
    assert [row.id for row in permissions.list(place.model, project_id=ids[1])] == [made[1].id]
    for row in made:
        permissions.delete(row.id, fine_tuned_model_checkpoint=place.model)
    assert permissions.list(place.model).data == []


def test_only_an_administrator_of_the_organization_shares_and_only_within_it(api: Api, place: Sharing) -> None:
    with session_scope(api.engine) as session:
        elsewhere, foreign = make_key(session, scopes=keys.EVERYTHING)
    with pytest.raises(openai.PermissionDeniedError):
        api.client.fine_tuning.checkpoints.permissions.create(place.model, project_ids=[place.friend_id])
    for project_id in (elsewhere.project_id, "proj_x", api.caller.project_id):
        with pytest.raises(openai.BadRequestError) as refused:
            place.admin.fine_tuning.checkpoints.permissions.create(
                place.model, project_ids=[place.friend_id, project_id]
            )
        assert refused.value.param == "project_ids.1"
    with OpenAI(base_url=f"{api.url}/v1", api_key=foreign, max_retries=0, http_client=held()) as theirs:
        with pytest.raises(openai.NotFoundError):
            theirs.fine_tuning.checkpoints.permissions.create(place.model, project_ids=[elsewhere.project_id])
        with pytest.raises(openai.NotFoundError):
            theirs.fine_tuning.checkpoints.permissions.list(place.model)
    with pytest.raises(openai.NotFoundError):
        place.friend.models.retrieve(place.model)
