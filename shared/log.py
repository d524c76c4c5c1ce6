"""Structured logs: one event with fields per line, on standard error."""

from __future__ import annotations

import contextlib
import sys
from typing import TextIO, cast

import structlog

from shared.settings import Settings


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
    exceptions = [structlog.processors.format_exc_info] if settings.log_json else []
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *exceptions,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
        logger_factory=structlog.PrintLoggerFactory(file=cast("TextIO", _Forgiving(sys.stderr))),
        cache_logger_on_first_use=False,
    )
