"""Requests that offer another protocol are answered in this one: the offer is passed over, as RFC 9110, 7.8 has it.

Java's own client offers h2c with its first request. httptools takes what follows the head of such a request for the
other protocol: the body would be lost, and the next request of the connection with it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_OF_HEADS: Final = ("on_message_begin", "on_url", "on_header", "on_headers_complete")
_OF_BODIES: Final = ("on_chunk_header", "on_body", "on_message_complete")


class NoUpgrade(HttpToolsProtocol):
    """One connection, which stays one of HTTP/1.1."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # No route speaks it; a connection that is handed over would never be counted out.
        self.ws_protocol_class = None

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserError:
                self.send_400_response("")
            except httptools.HttpParserUpgrade as offer:
                data = data[offer.args[0] :]
                self._go_on()
                continue
            return

    def on_message_complete(self) -> None:
        if not self._framing_of_rest():
            self.on_whole_message()

    def on_whole_message(self) -> None:
        """The body has come to its end."""
        super().on_message_complete()

    def _framing_of_rest(self) -> bytes:
        """The field that says how long the body is which the parser takes for another protocol's; empty: none is."""
        if not self.parser.should_upgrade():
            return b""
        fields = [field for field in self.headers if field[0] in {b"content-length", b"transfer-encoding"}]
        return b"" if not fields or fields[0][1].strip(b"0 ") == b"" else b"%b: %b\r\n" % fields[0]

    def _go_on(self) -> None:
        """Have what follows a head read by another parser, which begins in the middle of the message."""
        framing, teller = self._framing_of_rest(), _Teller(self)
        self.parser = httptools.HttpRequestParser(teller)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        if framing:
            self.parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % framing)
        teller.silent = False


class _Teller:
    """What a parser calls: a connection's methods, without those for the head that the parser was begun with."""

    def __init__(self, connection: NoUpgrade) -> None:
        self.silent = True
        for name in _OF_HEADS:
            setattr(self, name, partial(self._told, getattr(connection, name)))
        for name in _OF_BODIES:
            setattr(self, name, getattr(connection, name, lambda: None))

    def _told(self, call: Callable[..., None], *values: bytes) -> None:
        if not self.silent:
            call(*values)
