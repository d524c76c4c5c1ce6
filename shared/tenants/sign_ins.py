"""Sign-ins of the page: a browser sends a key once, and a random token in a cookie from then on.

The token stands for the key within the page, never at the API. A key that ends, ends its sign-ins. So does the end of a
key's former secrets: nobody knows which secret a browser showed.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, delete, func, or_, select, update
from sqlalchemy.orm import Session

from shared.errors import Forbidden, Unauthenticated
from shared.ids import new_id
from shared.settings import Settings
from shared.store.tables import ApiKeyRow, SignInRow
from shared.tenants import audit, keys
from shared.tenants.keys import Caller

# How old `seen_at` may be before it is written again: reading a page is rarely a write.
SEEN_SECONDS: Final = 60
_BYTES: Final = 32
MOST_KEYS: Final = 50  # of one person, on the page of a sign-in


@dataclass(frozen=True, slots=True)
class SignedIn:
    """A browser that is signed in, and whom it acts for."""

    sign_in_id: str
    caller: Caller
    token: str

    def proof(self, act: str = "") -> str:
        """What a form of ours carries and a stranger's cannot know; bound to the sign-in, and to an act if named."""
        return hmac.new(self.token.encode(), f"form:{act}".encode(), hashlib.sha256).hexdigest()

    def must_prove(self, proof: str, *, act: str = "") -> None:
        """Raises Forbidden unless the form was one of ours."""
        if not hmac.compare_digest(proof.encode(), self.proof(act).encode()):
            raise Forbidden(
                "This form does not belong to your sign-in. Go back, load the page again and send it once more.",
                code="form_not_ours",
            )


def keys_of(session: Session, person: str) -> Sequence[ApiKeyRow]:
    """The live keys that stand for somebody whom a proxy names: those of that very name, which administrators give."""
    live = (ApiKeyRow.revoked_at.is_(None), ApiKeyRow.expires_at.is_(None) | (ApiKeyRow.expires_at > func.now()))
    named = func.lower(ApiKeyRow.name) == person.lower()
    return session.scalars(select(ApiKeyRow).where(named, *live).order_by(ApiKeyRow.id).limit(MOST_KEYS)).all()


def begin_by_proxy(session: Session, key_id: str, *, person: str) -> SignedIn:
    """Sign a browser in as somebody whom a proxy names. Raises Unauthenticated unless the key is that person's."""
    if key_id not in {row.id for row in keys_of(session, person)}:
        raise Unauthenticated("This key does not stand for you; ask your administrator for one.", code="not_your_key")
    owner = session.execute(keys.OWNERS.where(ApiKeyRow.id == key_id)).one()
    return begin(session, keys.caller_of(owner._mapping), by="proxy")


def begin(session: Session, caller: Caller, *, by: str = "key") -> SignedIn:
    """Sign a browser in as this caller, noted in the audit."""
    token = secrets.token_urlsafe(_BYTES)
    row = SignInRow(id=new_id("signin_"), key_id=caller.key_id, sha256=_digest(token))
    session.add(row)
    session.flush()
    audit.record(session, caller, "page.sign_in", row.id, after={"by": by})
    return SignedIn(row.id, caller, token)


def _digest(token: str) -> str:
    # 256 random bits need no slow hash: there is no guessing them.
    return hashlib.sha256(token.encode()).hexdigest()


def resume(session: Session, token: str, settings: Settings) -> SignedIn:
    """Who shows this token. Raises Unauthenticated when the sign-in or its key has ended."""
    row = session.execute(_of(token, settings)).one_or_none()
    if row is None:
        raise Unauthenticated("You are signed out. Sign in with your API key.", code="signed_out")
    owner = dict(row._mapping)
    sign_in_id, seen_at, now = owner.pop("sign_in_id"), owner.pop("seen_at"), owner.pop("now")
    _see(session, sign_in_id, owner["key_id"], seen_at=seen_at, now=now)
    return SignedIn(sign_in_id, keys.caller_of(owner), token)


def stands(session: Session, token: str, settings: Settings, *, scope: str) -> bool:
    """Whether an open page may still show what needs `scope`. It is no sign of a reader, so the idle time goes on."""
    row = session.execute(_of(token, settings)).one_or_none()
    if row is None:
        return False
    owner = {name: value for name, value in row._mapping.items() if name not in {"sign_in_id", "seen_at", "now"}}
    return keys.caller_of(owner).may(scope)


def _of(token: str, settings: Settings) -> Select[Any]:
    return (
        keys.OWNERS.join(SignInRow, SignInRow.key_id == ApiKeyRow.id)
        .add_columns(SignInRow.id.label("sign_in_id"), SignInRow.seen_at, func.now().label("now"))
        .where(SignInRow.sha256 == _digest(token), *_alive(settings), _of_a_live_secret())
    )


def _of_a_live_secret() -> ColumnElement[bool]:
    until = ApiKeyRow.former_until
    return or_(until.is_(None), until > func.now(), SignInRow.created_at > until)


def _see(session: Session, sign_in_id: str, key_id: str, *, seen_at: datetime, now: datetime) -> None:
    if now - seen_at > timedelta(seconds=SEEN_SECONDS):
        keys.note_use(session, key_id)
        session.execute(update(SignInRow).where(SignInRow.id == sign_in_id).values(seen_at=func.now()))


def _alive(settings: Settings) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return (
        SignInRow.seen_at > func.now() - timedelta(seconds=settings.page_idle_seconds),
        SignInRow.created_at > func.now() - timedelta(seconds=settings.page_sign_in_seconds),
    )


def end(session: Session, signed_in: SignedIn, *, everywhere: bool = False) -> None:
    """Sign this browser out, or every browser that is signed in with the same key."""
    mine = SignInRow.key_id == signed_in.caller.key_id if everywhere else SignInRow.id == signed_in.sign_in_id
    session.execute(delete(SignInRow).where(mine))
    action = "page.sign_out_everywhere" if everywhere else "page.sign_out"
    audit.record(session, signed_in.caller, action, signed_in.sign_in_id)


def count(session: Session, key_id: str, settings: Settings) -> int:
    """Browsers that are signed in with the key."""
    query = select(func.count()).select_from(SignInRow).where(SignInRow.key_id == key_id, *_alive(settings))
    return session.scalar(query) or 0


def forget(session: Session, *, settings: Settings) -> None:
    """Drop sign-ins that have ended by themselves."""
    idle, old = _alive(settings)
    session.execute(delete(SignInRow).where(~idle | ~old))
