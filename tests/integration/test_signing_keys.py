"""The keys that sign adapters: made once, replaced, kept in the database or in a file, and public for everybody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
from cryptography.fernet import Fernet
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from pydantic import SecretStr
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey
from sqlalchemy.orm import Session

from shared.errors import Conflict, Invalid
from shared.settings import Settings
from shared.store.db import session_scope
from shared.tenants import signing_keys
from shared.tenants.signing_keys import SigningKey
from tests.integration.conftest import Api
from tests.patience import patience


@pytest.fixture
def sealing(settings: Settings) -> Settings:
    return settings.model_copy(update={"secrets_key": SecretStr(Fernet.generate_key().decode())})


def in_file(settings: Settings, file: Path) -> tuple[Settings, SigningKey]:
    """Settings that name a key file, and its key."""
    key = SigningKey.of(Ed25519PrivateKey.generate())
    file.write_text(key.private_pem())
    return settings.model_copy(update={"provenance_key_file": file}), key


def test_the_first_start_makes_a_key_and_the_next_ones_leave_it(session: Session, sealing: Settings) -> None:
    made = signing_keys.ensure(session, sealing)

    assert signing_keys.ensure(session, sealing) is None
    key = signing_keys.current(session, sealing)
    assert key is not None
    assert key.id == made
    (row,) = signing_keys.listed(session)
    assert "PRIVATE" not in (row.sealed or ""), "it lies there as it is"


def test_without_a_secret_to_encrypt_it_by_no_key_is_made_and_nothing_signs(
    session: Session, settings: Settings
) -> None:
    assert signing_keys.ensure(session, settings) is None
    assert signing_keys.current(session, settings) is None
    with pytest.raises(Invalid) as refused:
        signing_keys.rotate(session, settings)
    assert refused.value.code == "secrets_key_missing"


def test_a_rotation_keeps_the_old_public_key_and_forgets_its_private_half(session: Session, sealing: Settings) -> None:
    old = signing_keys.ensure(session, sealing)
    new = signing_keys.rotate(session, sealing)

    key = signing_keys.current(session, sealing)
    assert key is not None
    assert key.id == new
    by_id = {row.id: row for row in signing_keys.listed(session)}
    assert by_id.keys() == {old, new}
    assert (by_id[old].retired_at is not None, by_id[old].sealed) == (True, None)
    assert "BEGIN PUBLIC KEY" in by_id[old].public_key


def test_a_key_of_a_file_is_taken_up_replaced_and_brought_back(
    session: Session, settings: Settings, tmp_path: Path
) -> None:
    named, first = in_file(settings, tmp_path / "key.pem")
    assert signing_keys.ensure(session, named) == first.id
    assert signing_keys.ensure(session, named) is None
    with pytest.raises(Conflict) as known:
        signing_keys.rotate(session, named)
    assert known.value.code == "signing_key_known"

    _, second = in_file(settings, tmp_path / "key.pem")
    with pytest.raises(Invalid) as unknown:  # before the command is run, nothing is signed by what nobody knows
        signing_keys.current(session, named)
    assert unknown.value.code == "signing_key_unknown"
    assert signing_keys.rotate(session, named) == second.id

    (tmp_path / "key.pem").write_text(first.private_pem())
    assert signing_keys.ensure(session, named) == first.id
    back = signing_keys.current(session, named)
    assert back is not None
    assert back.id == first.id


@pytest.mark.parametrize("content", [b"", b"no key", b"x25519"])
def test_a_file_that_holds_no_ed25519_key_is_refused_by_name(
    session: Session, settings: Settings, tmp_path: Path, content: bytes
) -> None:
    named, _ = in_file(settings, tmp_path / "key.pem")
    if content == b"x25519":
        other: Any = SigningKey("", X25519PrivateKey.generate())  # type: ignore[arg-type]
        content = other.private_pem().encode()
    (tmp_path / "key.pem").write_bytes(content)

    with pytest.raises(Invalid, match="TUNEPOOL_PROVENANCE_KEY_FILE cannot be read") as refused:
        signing_keys.ensure(session, named)

    assert refused.value.code == "signing_key_missing"


def test_a_worker_without_the_file_says_where_the_key_is(session: Session, settings: Settings, tmp_path: Path) -> None:
    named, _ = in_file(settings, tmp_path / "key.pem")
    signing_keys.ensure(session, named)

    with pytest.raises(Invalid, match="name it by TUNEPOOL_PROVENANCE_KEY_FILE here, too"):
        signing_keys.current(session, settings)


def test_another_projects_verifier_reads_what_we_sign() -> None:
    key = SigningKey.of(Ed25519PrivateKey.generate())
    envelope = key.envelope('{"ü": 1}'.encode(), payload_type="application/vnd.in-toto+json")
    theirs = SSlibKey.from_crypto(load_pem_public_key(key.public_pem.encode()), keyid=key.id)  # type: ignore[arg-type]

    read = Envelope.from_dict(json.loads(json.dumps(envelope)))

    assert read.verify([theirs], 1) == {key.id: theirs}
    assert json.loads(read.payload) == {"ü": 1}


def test_anybody_may_read_the_public_keys_and_nothing_else(api: Api, sealing: Settings) -> None:
    with session_scope(api.engine) as session:
        first = signing_keys.ensure(session, sealing)
        second = signing_keys.rotate(session, sealing)

    with httpx2.Client(base_url=api.url, timeout=patience(20)) as nobody:
        answer = nobody.get("/v1/tunepool/signing-keys").json()["data"]

    assert [key["id"] for key in answer] == [second, first]
    assert [key["retired_at"] is None for key in answer] == [True, False]
    assert answer[0].keys() == {"id", "object", "algorithm", "public_key", "created_at", "retired_at"}
