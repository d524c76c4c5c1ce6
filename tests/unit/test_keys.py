"""API keys: what is refused without asking anybody."""

from __future__ import annotations

import pytest
from sqlalchemy import create_engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from shared.errors import Forbidden, Unauthenticated
from shared.tenants import keys
from shared.tenants.keys import Caller

SECRET = "0123456789abcdefghijABCDEFGHIJKL"
# A database that cannot be asked: whoever asks it fails with another error than the one expected.
UNREACHABLE = Session(create_engine("postgresql+psycopg://nobody@127.0.0.1:1/nothing"))


def well_formed() -> str:
    return f"tp_{SECRET}_{keys._checksum(SECRET)}"


@pytest.mark.parametrize(
    "junk",
    [
        "",
        "tp_",
        "sk-1234567890",
        f"tp_{SECRET}",
        f"tp_{SECRET}_000000",
        f"tp_{SECRET[::-1]}_{keys._checksum(SECRET)}",
        f"TP_{SECRET}_{keys._checksum(SECRET)}",
        f"{well_formed()} ",
        f"{well_formed()}\n",
        "a" * 100_000,
        "ü" * 40,
        "\x00",
    ],
)
def test_junk_is_refused_by_its_checksum_before_the_database_is_asked(junk: str) -> None:
    with pytest.raises(Unauthenticated):
        keys.authenticate(UNREACHABLE, junk)


def test_a_mistyped_key_is_told_so() -> None:
    mistyped = well_formed().replace("ABC", "ACB")

    with pytest.raises(Unauthenticated, match=r"\*\*\*\*.*Its checksum does not fit: it is mistyped"):
        keys.authenticate(UNREACHABLE, mistyped)


@pytest.mark.parametrize("prefix", [keys.LASTING, keys.EXCHANGED])
def test_a_new_secret_is_well_formed_and_little_of_it_is_shown(prefix: str) -> None:
    secret = keys.new_secret(prefix)

    assert keys._prefix_of(secret) == prefix
    assert keys.shown(secret) == secret[: len(prefix) + 4]
    assert keys.new_secret(prefix) != secret


def test_a_well_formed_key_is_looked_up() -> None:
    with pytest.raises(OperationalError):
        keys.authenticate(UNREACHABLE, well_formed())


@pytest.mark.parametrize("position", range(32))
def test_one_wrong_character_anywhere_is_noticed(position: int) -> None:
    other = "0" if SECRET[position] != "0" else "1"
    misspelt = SECRET[:position] + other + SECRET[position + 1 :]

    assert keys._checksum(misspelt) != keys._checksum(SECRET)


@pytest.mark.parametrize(
    ("scopes", "allowed"), [({"jobs:read"}, True), ({"*"}, True), ({"jobs:write"}, False), (set(), False)]
)
def test_a_caller_may_do_what_its_scopes_say(scopes: set[str], allowed: bool) -> None:
    caller = Caller("key_1", "proj_1", "org_1", "org", frozenset(scopes))

    if allowed:
        caller.must("jobs:read")
    else:
        with pytest.raises(Forbidden, match="jobs:read"):
            caller.must("jobs:read")
