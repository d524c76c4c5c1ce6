"""A server to talk to: the one that runs in this home already, else one of our own that ends when we do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from openai import OpenAIError
from tunepool.connection import Credentials, NoServerKnown, read_credentials

START_SECONDS: Final = 120.0
STOP_SECONDS: Final = 60.0
SERVER: Final = Path(sys.executable).parent / "tunepool-server"


class StackFailed(Exception):
    """The server did not come up; the message holds the end of its log."""


@contextmanager
def running_stack(home: Path, *, port: int = 8765) -> Iterator[Credentials]:
    """Credentials of a server that answers; one that we start takes `port` (0: any). Raises StackFailed."""
    found = answering(home)
    if found is not None:
        yield found
        return
    home.mkdir(parents=True, exist_ok=True)
    log = home / "server.log"
    with log.open("ab") as output:
        # A session of its own: Ctrl-C reaches us alone, and we stop the server in order.
        server = subprocess.Popen(
            [SERVER, "up", "--home", home, "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield _wait_until_it_answers(server, home=home, log=log)
    finally:
        _stop(server)


def answering(home: Path) -> Credentials | None:
    """The credentials in `home`, if a server answers to them now."""
    try:
        credentials = read_credentials(home)
        credentials.client(timeout_seconds=3.0).with_options(max_retries=0).models.list()
    except (NoServerKnown, OpenAIError):
        return None
    return credentials


def server_command(*words: str, home: Path) -> str:
    """What `tunepool-server WORDS` prints. Raises subprocess.CalledProcessError."""
    return subprocess.run(
        [SERVER, *words, "--home", home], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()


@contextmanager
def started_command(*words: str, home: Path) -> Iterator[Callable[[], str]]:
    """`tunepool-server WORDS` beside what else is done: a call waits for what it prints, once.

    The call raises subprocess.CalledProcessError. Whoever leaves before it has ended ends it.
    """
    command = [str(SERVER), *words, "--home", str(home)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:

        def printed() -> str:
            output = process.communicate()[0]
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, command, output)
            return output.strip()

        try:
            yield printed
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)


def _wait_until_it_answers(server: subprocess.Popen[bytes], *, home: Path, log: Path) -> Credentials:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        credentials = answering(home)
        if credentials is not None:
            return credentials
        time.sleep(0.1)
    raise StackFailed(
        f"The server did not come up. The end of {log}:\n" + "\n".join(log.read_text().splitlines()[-20:])
    )


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGINT)
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
