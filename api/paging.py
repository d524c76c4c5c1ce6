"""`after` and `limit` of a list, as every route takes them."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query
from pydantic import BeforeValidator


def _given(after: str | None) -> str | None:
    """`after=` is none: the client for Node writes null so, and so does a script with its variable still empty."""
    return after or None


# The last id, or name, of the page before.
After = Annotated[str | None, Query(max_length=100), BeforeValidator(_given)]
AfterName = Annotated[str | None, Query(max_length=200), BeforeValidator(_given)]
Limit = Annotated[int, Query(ge=1, le=100)]
