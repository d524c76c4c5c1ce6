"""Bodies of the routes of a project's secrets."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import Field

from shared.contract.part import Part


class StoreSecret(Part):
    """A value that nothing shows again."""

    # Not typed: what pydantic refuses is shown to whoever sent it, and nothing of a secret may be.
    value: Annotated[Any, Field(json_schema_extra={"type": "string", "maxLength": 2000, "writeOnly": True})]


BODIES: Final = (StoreSecret,)
