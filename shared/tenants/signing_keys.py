"""The ed25519 keys that sign where adapters come from: made, rotated, listed, and put to use.

The private key lies in the database, encrypted (secret_box.py), or in a file that TUNEPOOL_PROVENANCE_KEY_FILE names.
A replaced key keeps its public half, so its signatures can be verified for ever. Its private half goes.

What is signed goes into an envelope: DSSE 1.0, https://github.com/secure-systems-lab/dsse/blob/master/protocol.md.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from shared.errors import Conflict, Invalid
from shared.settings import Settings
from shared.store.tables import SigningKeyRow
from shared.tenants.secret_box import SecretBox


@dataclass(frozen=True, slots=True)
class SigningKey:
    """`id`: sha256 of the public key (DER, SubjectPublicKeyInfo), in hex."""

    id: str
    private: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def of(cls, private: Ed25519PrivateKey) -> SigningKey:
        der = private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return cls(hashlib.sha256(der).hexdigest(), private)

    @property
    def public_pem(self) -> str:
        return self.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()

    def private_pem(self) -> str:
        return self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()

    def envelope(self, payload: bytes, *, payload_type: str) -> dict[str, Any]:
        """The payload with our signature, as DSSE's JSON."""
        signature = self.private.sign(pre_authentication_encoding(payload_type, payload))
        return {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": payload_type,
            "signatures": [{"keyid": self.id, "sig": base64.b64encode(signature).decode()}],
        }


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """What DSSE signs in place of the payload: type and payload, each behind its length in bytes."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def current(session: Session, settings: Settings) -> SigningKey | None:
    """The key that signs; None where none has been made. Raises Invalid when it cannot be read here."""
    row = _signing(session)
    if row is None:
        return None
    if settings.provenance_key_file is None and row.sealed is None:
        raise Invalid(
            "The private key that signs lies in a file: name it by TUNEPOOL_PROVENANCE_KEY_FILE here, too.",
            code="signing_key_missing",
        )
    key = _of_file(settings) or _read((row.sealed or "").encode(), opened_by=SecretBox(settings))
    if key.id != row.id:
        raise Invalid(
            f"The key of TUNEPOOL_PROVENANCE_KEY_FILE is {key.id[:16]}…, and {row.id[:16]}… signs: run "
            "`tunepool-server signing-keys rotate` with the new file.",
            code="signing_key_unknown",
        )
    return key


def ensure(session: Session, settings: Settings) -> str | None:
    """Make the first key, or take up the one of the file that the settings name. Any number may do so at once.

    Returns its id; None when there is one already, or nothing that could encrypt it. Raises Invalid.
    """
    row = _signing(session)
    named = _of_file(settings)
    if named is not None:
        return None if row is not None and row.id == named.id else _replace(session, named, sealed=None)
    if row is not None or not settings.secrets_key.get_secret_value():
        return None
    return _add(session, *_made(settings))


def rotate(session: Session, settings: Settings) -> str:
    """Have another key sign from now on: a new one, or that of the file. Returns its id. Raises Invalid, Conflict."""
    named = _of_file(settings)
    if named is None:
        return _replace(session, *_made(settings))
    if session.get(SigningKeyRow, named.id) is not None:
        raise Conflict(
            f"The key of TUNEPOOL_PROVENANCE_KEY_FILE ({named.id[:16]}…) is known already; put a new one there.",
            code="signing_key_known",
        )
    return _replace(session, named, sealed=None)


def listed(session: Session) -> Sequence[SigningKeyRow]:
    """All keys, the one that signs first: the public halves of those that have been replaced, too."""
    order = (SigningKeyRow.retired_at.is_not(None), SigningKeyRow.created_at.desc(), SigningKeyRow.id)
    return session.scalars(select(SigningKeyRow).order_by(*order)).all()


def _signing(session: Session) -> SigningKeyRow | None:
    return session.scalars(select(SigningKeyRow).where(SigningKeyRow.retired_at.is_(None))).one_or_none()


def _made(settings: Settings) -> tuple[SigningKey, str]:
    key = SigningKey.of(Ed25519PrivateKey.generate())
    return key, SecretBox(settings).close(key.private_pem())


def _replace(session: Session, key: SigningKey, sealed: str | None) -> str:
    session.execute(
        update(SigningKeyRow).where(SigningKeyRow.retired_at.is_(None)).values(retired_at=func.now(), sealed=None)
    )
    return _add(session, key, sealed) or key.id


def _add(session: Session, key: SigningKey, sealed: str | None) -> str | None:
    """None: another has made one meanwhile. A file may bring a key back that signed before."""
    adding = insert(SigningKeyRow).values(id=key.id, public_key=key.public_pem, sealed=sealed)
    adding = (
        adding.on_conflict_do_nothing()
        if sealed is not None
        else adding.on_conflict_do_update(index_elements=["id"], set_={"retired_at": None})
    )
    return session.scalar(adding.returning(SigningKeyRow.id))


def _of_file(settings: Settings) -> SigningKey | None:
    if settings.provenance_key_file is None:
        return None
    try:
        return _read(settings.provenance_key_file.read_bytes(), opened_by=None)
    except (OSError, ValueError) as error:
        raise Invalid(
            f"TUNEPOOL_PROVENANCE_KEY_FILE cannot be read: {error}. Make one by `openssl genpkey -algorithm ed25519`.",
            code="signing_key_missing",
        ) from None


def _read(text: bytes, *, opened_by: SecretBox | None) -> SigningKey:
    """Raises ValueError for what is no ed25519 key, Invalid when the box does not open it."""
    pem = text if opened_by is None else opened_by.open(text.decode()).encode()
    private = load_pem_private_key(pem, password=None)
    if not isinstance(private, Ed25519PrivateKey):
        raise ValueError("it is no ed25519 key")
    return SigningKey.of(private)
