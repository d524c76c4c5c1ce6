"""`after` and `limit` of a list, as every route takes them."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query

# The last id, or name, of the page before.
After = Annotated[str | None, Query(max_length=100)]
AfterName = Annotated[str | None, Query(max_length=200)]
Limit = Annotated[int, Query(ge=1, le=100)]
