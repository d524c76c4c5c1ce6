"""Structured logs: one event with fields per line, on standard error."""

from __future__ import annotations

import contextlib
import sys
from typing import TextIO, cast

import structlog

from shared.settings import Settings
from shared.tenants.plain_text import printable


class _Forgiving:
    """Standard error that drops what cannot be written: on a full disk an answer is worth more than a line about it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def _plain(_logger: object, _method: str, entry: structlog.types.EventDict) -> structlog.types.EventDict:
    """Paths, labels and last words are strangers' text: a log line gives no orders to the terminal that shows it.

    Whatever is no text is shown by its repr, which escapes them.
    """
    return {name: printable(value) if isinstance(value, str) else value for name, value in entry.items()}


def configure(settings: Settings) -> None:
    """Set up structlog for this process: for people, or as JSON lines.

    Tracebacks are plain: a renderer that prints local variables would print keys and user data with them.
    """
    renderer: structlog.types.Processor = (
        structlog.processors.JSONRenderer()
        if settings.log_json
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _plain,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
        logger_factory=structlog.PrintLoggerFactory(file=cast("TextIO", _Forgiving(sys.stderr))),
        cache_logger_on_first_use=False,
    )
