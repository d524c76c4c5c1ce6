"""Identifiers: OpenAI's prefixes, and behind them a UUIDv7, so that ids sort by the time they were made."""

from __future__ import annotations

import re
from typing import Final

from uuid_utils.compat import uuid7

_WELL_FORMED: Final = re.compile(
    r"(?:ftjob-|file-|ftevent-|ftckpt_|adapter_|merge_|export_|eval_|key_|proj_|org_|worker_|upload_|part_|webhook_|delivery_"
    r"|evt_|cp_|tracking_)[A-Za-z0-9_-]{1,64}"
)


def new_id(prefix: str) -> str:
    """`prefix` followed by 32 hexadecimal digits of a fresh UUIDv7."""
    return f"{prefix}{uuid7().hex}"


def is_id(text: str) -> bool:
    """Whether `text` could be one of our ids; anything else need not reach the database."""
    return _WELL_FORMED.fullmatch(text) is not None
