"""Reads multipart uploads as a stream. Bytes go to the store as they arrive: no whole file in memory or on disk."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Final

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from api.file_rules import clean_name
from api.hashing import Sha256
from shared.errors import Invalid, TooLarge, TunepoolError
from shared.rows.kinds import HEAD_BYTES
from shared.store.storage import Store

MAX_FIELD_BYTES: Final = 4096
MAX_FIELDS: Final = 16
MAX_EPILOGUE_BYTES: Final = 65_536  # after the form's end; RFC 2046 has a reader pass over it


@dataclass
class ReceivedForm:
    """The contents of a form. `sha256`, `bytes` and `head` (what it begins with) describe the file part."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    sha256: str = ""
    head: bytes = b""
    bytes: int = 0


class _Part:
    def __init__(self) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.name = b""
        self.filename: str | None = None
        self.value = bytearray()


class FormStream:
    """Reads one multipart form. Iterate `chunks()` for the file, named `part`; the fields are complete afterwards."""

    def __init__(self, request: Request, *, max_file_bytes: int, part: str = "file") -> None:
        kind, options = parse_options_header(request.headers.get("content-type", ""))
        if kind != b"multipart/form-data" or b"boundary" not in options:
            also = " and a part 'purpose'" if part == "file" else ""
            raise Invalid(
                f"Upload with multipart/form-data: a part '{part}'{also}.",
                param="Content-Type",
                code="unsupported_media_type",
            )
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise Invalid(
                "Compressed uploads are not accepted; send the file as it is.",
                param="Content-Encoding",
                code="unsupported_media_type",
            )
        self.received = ReceivedForm()
        self._file = part
        self._stream = request.stream()
        self._max = max_file_bytes
        self._ready: deque[bytes] = deque()
        self._digest = Sha256()
        self._part = _Part()
        self._header = (bytearray(), bytearray())
        self._closed = False
        self._parser = self._make_parser(options[b"boundary"])

    def _make_parser(self, boundary: bytes) -> MultipartParser:
        callbacks: Any = {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._open,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._close,
        }
        try:
            return MultipartParser(boundary, callbacks)
        except FormParserError as error:
            raise Invalid(f"The multipart boundary is not usable: {error}", code="invalid_multipart") from error

    async def chunks(self) -> AsyncIterator[bytes]:
        """The file part's bytes. Raises Invalid, TooLarge."""
        begun, behind = False, 0
        async for data in self._stream:
            if not data:
                continue
            if self._closed:
                behind += len(data)
                if behind > MAX_EPILOGUE_BYTES:
                    raise Invalid(
                        f"More than {MAX_EPILOGUE_BYTES} bytes follow the form's end.", code="invalid_multipart"
                    )
            try:
                self._parser.write(data)
            except FormParserError as error:
                raise Invalid(f"The multipart body is malformed: {error}", code="invalid_multipart") from error
            while self._ready:
                piece = self._ready.popleft()
                await self._digest.add(piece)  # while the store takes the same piece
                yield piece
            begun = True
        if begun and not self._closed:
            # Without its closing boundary the file's end is unknown: half a data set must not pass for a whole one.
            raise Invalid(
                "The upload ends before the form does: it was cut off on its way. Send it again.",
                param=self._file,
                code="invalid_multipart",
            )
        self.received.sha256 = await self._digest.hexdigest()
        if self.received.filename is None:
            raise Invalid(
                f"Missing required parameter: '{self._file}'.", param=self._file, code="missing_required_parameter"
            )

    def _close(self) -> None:
        self._closed = True

    def _begin(self) -> None:
        self._part = _Part()
        if len(self.received.fields) >= MAX_FIELDS:
            raise Invalid(f"The form has more than {MAX_FIELDS} fields.", code="invalid_multipart")

    def _end_header(self) -> None:
        self._part.headers[bytes(self._header[0]).lower()] = bytes(self._header[1])
        self._header = (bytearray(), bytearray())

    def _open(self) -> None:
        _, options = parse_options_header(self._part.headers.get(b"content-disposition", b""))
        self._part.name = options.get(b"name", b"")
        if self._part.name != self._file.encode():
            return
        if self.received.filename is not None:
            raise Invalid(
                f"The form has more than one part '{self._file}'; upload one file at a time.", param=self._file
            )
        if b"filename" not in options:
            raise Invalid(f"The part '{self._file}' has no filename; send it as a file, not as text.", param=self._file)
        self._part.filename = self.received.filename = clean_name(options[b"filename"].decode("utf-8", "replace"))

    def _data(self, data: bytes, start: int, end: int) -> None:
        piece = data[start:end]
        if self._part.filename is None:
            self._part.value += piece
            if len(self._part.value) > MAX_FIELD_BYTES:
                raise Invalid(f"The field '{self._name}' is longer than {MAX_FIELD_BYTES} bytes.", param=self._name)
            return
        self.received.bytes += len(piece)
        if self.received.bytes > self._max:
            raise TooLarge(
                f"The file is larger than {self._max} bytes. Send it in parts by /v1/uploads."
                if self._file == "file"
                else f"A part has at most {self._max} bytes. Send smaller ones.",
                param=self._file,
            )
        if len(self.received.head) < HEAD_BYTES:
            self.received.head = (self.received.head + piece)[:HEAD_BYTES]
        self._ready.append(piece)

    @property
    def _name(self) -> str:
        return self._part.name.decode("utf-8", "replace")[:100]

    def _end(self) -> None:
        if self._part.filename is None:
            if self._name in self.received.fields:
                raise Invalid(f"The field '{self._name}' is given twice.", param=self._name)
            self.received.fields[self._name] = self._part.value.decode("utf-8", "replace")


async def store_form(store: Store, key: str, form: FormStream) -> None:
    """Stream the file part of a form into the store. What is wrong with the form leaves no object.

    Raises Invalid, TooLarge, Unavailable.
    """
    faults: list[TunepoolError] = []

    async def chunks() -> AsyncIterator[bytes]:
        # The store wraps what its source raises; ours must come out as it went in.
        try:
            async for chunk in form.chunks():
                yield chunk
        except TunepoolError as error:
            faults.append(error)
            raise

    try:
        await store.put_stream(key, chunks())
    except BaseException:
        if faults:
            raise faults[0] from None
        raise
