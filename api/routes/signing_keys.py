"""/v1/tunepool/signing-keys: the public keys by which anybody verifies where an adapter comes from."""

from __future__ import annotations

from fastapi import APIRouter

from api.deps import DoorDep
from api.views.signing_key_views import SigningKeyPage, signing_key
from shared.tenants import signing_keys

router = APIRouter(prefix="/v1/tunepool", tags=["tunepool"])


@router.get("/signing-keys", response_model=SigningKeyPage)
def list_signing_keys(door: DoorDep) -> SigningKeyPage:
    """The key that signs adapters, and those that have signed some. Public: no API key is needed."""
    with door.reading() as session:
        return SigningKeyPage(data=[signing_key(row) for row in signing_keys.listed(session)])
