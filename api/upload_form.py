"""Judges the form of an upload, field by field, and makes the upload of it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

from api.file_rules import refuse_name, refuse_purpose
from shared.errors import Invalid
from shared.products.files import Upload
from shared.rows.kinds import kind_of


def upload_of(
    fields: Mapping[str, str], *, filename: str, size: int, sha256: str, head: bytes, key: str, file_id: str
) -> Upload:
    """The upload that a form describes.

    Args:
        fields: the form without its file.
        size: bytes of the file, which lies at `key` already.
        head: what the file begins with; its kind is read from it.

    Raises:
        Invalid: a field is missing, unknown or wrong, or the file is empty or of no kind that is offered.
    """
    known = dict(fields)
    purpose = known.pop("purpose", None)
    if purpose is None:
        raise Invalid("Missing required parameter: 'purpose'.", param="purpose", code="missing_required_parameter")
    refuse_purpose(purpose)
    expires_after = _expiry(known.pop("expires_after[anchor]", None), known.pop("expires_after[seconds]", None))
    if known:
        name = sorted(known)[0]
        raise Invalid(
            f"Unknown parameter: '{name[:100]}'."
            " Known here: file, purpose, expires_after[anchor], expires_after[seconds].",
            param=name[:100],
            code="unknown_parameter",
        )
    if size == 0:
        raise Invalid("The file is empty.", param="file", code="empty_file")
    refuse_name(filename, purpose=purpose, param="file")
    return Upload(
        id=file_id,
        filename=filename,
        purpose=purpose,
        bytes=size,
        sha256=sha256,
        key=key,
        expires_after=expires_after,
        packed=purpose == "fine-tune" and kind_of(head, filename=filename) != "lines",
    )


def _expiry(anchor: str | None, text: str | None) -> timedelta | None:
    if anchor is None and text is None:
        return None
    if anchor != "created_at":
        raise Invalid("expires_after.anchor must be 'created_at'.", param="expires_after.anchor")
    if text is None or not (text.isascii() and text.isdigit() and len(text) < 10 and 3600 <= int(text) <= 2_592_000):
        raise Invalid("expires_after.seconds must be an integer from 3600 to 2592000.", param="expires_after.seconds")
    return timedelta(seconds=int(text))
