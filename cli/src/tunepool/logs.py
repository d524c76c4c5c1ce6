"""`tunepool logs`: what the trainer of a job printed, to its end if wanted."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from tunepool import native, official, watching
from tunepool.printing import json_line

PATIENCE_SECONDS: Final = 120.0  # a server that restarts is not the end
POLL_SECONDS: Final = 1.0
TERMINAL: Final = frozenset({"succeeded", "failed", "cancelled"})

Read = Callable[..., dict[str, Any]]


def logs(
    context: typer.Context,
    job_id: str,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    attempt: Annotated[int | None, typer.Option(min=1, help="This attempt; by default the newest.")] = None,
) -> None:
    """Print what the trainer of a job printed: secrets hidden, of a long log the beginning and the end."""
    remarks = Console(stderr=True)

    def read(**asked: Any) -> dict[str, Any]:
        return native.get(context, f"jobs/{native.part(job_id)}/logs", **asked)

    def status() -> str:
        return str(context.obj.client.fine_tuning.jobs.retrieve(job_id).status)

    source = followed(read, status, attempt=attempt) if follow else parts(read, attempt=attempt)
    with watching.interruptible_work(left=f"{job_id} goes its way; only its log is no longer shown."):
        for part in source:
            for remark in remarks_on(part):
                remarks.print(remark, markup=False, highlight=False, soft_wrap=True)
            if context.obj.as_json:
                print(json_line(part), flush=True)
            else:
                sys.stdout.write(harmless(part["text"]))
                sys.stdout.flush()


def harmless(text: str) -> str:
    """Without anything that acts on a terminal, whatever the server is."""
    return "".join(character if character.isprintable() or character in "\n\t" else "\ufffd" for character in text)


def remarks_on(part: dict[str, Any]) -> Iterator[str]:
    """What stands between the lines: a new attempt, a gap, a log that is not whole."""
    if part.get("begins"):
        yield f"--- attempt {part['attempt']} ---"
    if part["left_out"]:
        yield f"… {part['left_out']:,} bytes are left out …"
    if part.get("note") and not part["has_more"]:
        yield str(part["note"])


def parts(read: Read, *, attempt: int | None, after: int = 0) -> Iterator[dict[str, Any]]:
    """What can be read now, answer by answer; an attempt in the making is not left for a newer one."""
    while True:
        part = read(attempt=attempt, after=after)
        yield part
        if not part["has_more"] or part["next"] <= after:
            return
        attempt, after = part["attempt"], part["next"]


def followed(
    read: Read,
    status: Callable[[], str],
    *,
    attempt: int | None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[dict[str, Any]]:
    """Attempt after attempt until the job has ended; with `attempt` until that one has.

    Raises openai.APIConnectionError, openai.InternalServerError: the server stays away for `PATIENCE_SECONDS`.
    """
    number, after, begins, heard = attempt, 0, attempt is None, clock()
    while True:
        try:
            part = read(attempt=number, after=after)
        except official.NotFoundError as error:
            if getattr(error, "code", None) != "attempt_not_found" or status() in TERMINAL:
                raise
            heard = clock()
            sleep(POLL_SECONDS)
            continue
        except (official.APIConnectionError, official.InternalServerError):
            if clock() - heard > PATIENCE_SECONDS:
                raise
            sleep(POLL_SECONDS)
            continue
        heard, number = clock(), part["attempt"]
        moved = part["next"] > after
        if part["text"] or part["left_out"] or begins:
            yield {**part, "begins": True} if begins else part
            begins = False
        after = max(after, part["next"])
        if part["has_more"] and moved:
            continue
        if part["ended"]:
            if attempt is not None or (part["job_ended"] and part["attempts"] == number):
                return
            if part["attempts"] > part["attempt"]:
                number, after, begins = part["attempt"] + 1, 0, True
                continue
        sleep(POLL_SECONDS)
