"""What the form of an upload must say, read without a server."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from api.upload_form import upload_of
from shared.errors import Invalid
from shared.products.files import Upload

LINE = b'{"messages": []}\n'


def upload(*, filename: str = "rows.jsonl", size: int = len(LINE), head: bytes = LINE, **fields: str) -> Upload:
    named = {name.replace("__", "[") + ("]" if "__" in name else ""): value for name, value in fields.items()}
    return upload_of(named, filename=filename, size=size, sha256="0" * 64, head=head, key="key", file_id="file-1")


def test_a_form_makes_an_upload_that_expires_when_it_says() -> None:
    made = upload(purpose="fine-tune", expires_after__anchor="created_at", expires_after__seconds="3600")

    assert made == Upload(
        "file-1", "rows.jsonl", "fine-tune", len(LINE), "0" * 64, "key", expires_after=timedelta(hours=1), packed=False
    )


def test_a_table_waits_for_the_program_that_makes_rows_of_it() -> None:
    assert upload(purpose="fine-tune", filename="rows.parquet", head=b"PAR1").packed
    assert not upload(purpose="user_data", filename="rows.parquet", head=b"PAR1").packed


@pytest.mark.parametrize(
    ("form", "param", "words"),
    [
        ({}, "purpose", "Missing required parameter"),
        ({"purpose": "training"}, "purpose", "not 'training'"),
        ({"purpose": "evals", "colour": "red"}, "colour", "Unknown parameter: 'colour'"),
        ({"purpose": "evals", "size": 0}, "file", "The file is empty"),
        ({"purpose": "fine-tune", "filename": "rows.docx"}, "file", "not 'rows.docx'"),
        ({"purpose": "evals", "expires_after__seconds": "3600"}, "expires_after.anchor", "must be 'created_at'"),
        (
            {"purpose": "evals", "expires_after__anchor": "created_at", "expires_after__seconds": "1"},
            "expires_after.seconds",
            "from 3600 to 2592000",
        ),
    ],
)
def test_a_field_that_is_wrong_is_named(form: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(Invalid, match=words) as refusal:
        upload(**form)

    assert refusal.value.param == param
