"""Public keys on the wire."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from api.views.view import View, maybe_seconds, seconds
from shared.store.tables import SigningKeyRow


class SigningKeyView(View):
    """A public key; `retired_at`: it signs no more, and what it has signed holds."""

    id: str = Field(description="The `keyid` of its signatures: sha256 of the key (DER, SubjectPublicKeyInfo).")
    object: Literal["tunepool.signing_key"] = "tunepool.signing_key"
    algorithm: str = Field(examples=["ed25519"])
    public_key: str = Field(description="PEM.")
    created_at: int
    retired_at: int | None


class SigningKeyPage(View):
    object: Literal["list"] = "list"
    data: list[SigningKeyView]


def signing_key(row: SigningKeyRow) -> SigningKeyView:
    return SigningKeyView(
        id=row.id,
        algorithm=row.algorithm,
        public_key=row.public_key,
        created_at=seconds(row.created_at),
        retired_at=maybe_seconds(row.retired_at),
    )
