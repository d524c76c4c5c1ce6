"""The playground of a host: `python -m worker.chores.playground_queue`.

It takes questions over TCP and has a program answer.

One base model at a time is in memory, for as long as somebody asks; questions to another one wait for the running
answers, and for ten seconds let later ones to the base in memory go first. A training goes first:
see `PlaygroundQueue.look`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import hmac
import itertools
import secrets
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

if __name__ == "__main__":
    # What imports make lives to the end: to look through it meanwhile is a quarter of the start.
    gc.disable()

import structlog
from pydantic import ValidationError

from shared import log as logs
from shared.contract.generation import LINE_BYTES, Answered, Call, Declined, Ended, Held, Withdrawn
from shared.errors import Invalid, NotFound, TunepoolError
from shared.fleet import playgrounds
from shared.fleet.playgrounds import PlaygroundAddress, PlaygroundReport, State
from shared.operating.secrecy import hide_secrets
from shared.settings import Settings
from shared.store import schema
from worker.chores.playground_program import HeldWeights, PlaygroundProgram, place
from worker.host import devices
from worker.host.flags import SharedFlags
from worker.host.found_device import FoundDevice
from worker.host.host import AWAY, Host, open_host
from worker.program import hostile_folder, processes

log = structlog.get_logger()

CALL_SECONDS: Final = 10.0  # within which a caller says what it wants
OVERTAKEN_SECONDS: Final = 10.0  # so long may later questions to the weights in memory go before one to others
YIELDS: Final = "A training needs the playground's device now. Try again when it has ended, or later."
LET_GO: Final = "The playground has let the model go. Try again."


class PlaygroundCall:
    """One call: what is asked, and what was said so far and not yet sent."""

    def __init__(self, number: int, call: Call, *, asked_at: float) -> None:
        self.number = number
        self.asked_at = asked_at
        self.target = call.target
        self.question = call.question.model_copy(update={"number": number})
        self.answers: asyncio.Queue[Answered] = asyncio.Queue()
        self.gone = False  # its caller has left
        self.over = False

    def hear(self, answer: Answered) -> None:
        if not self.over:
            self.over = isinstance(answer, Ended | Declined)
            self.answers.put_nowait(answer)

    def decline(self, code: str, message: str, *, param: str | None = None, passing: bool = True) -> None:
        self.hear(Declined(number=self.number, code=code, message=message, param=param, passing=passing))


class _CallerGone(Exception):
    """Nobody waits for what is being fetched."""


class PlaygroundQueue:
    """Takes calls, keeps them in order, and has one program at a time answer them."""

    def __init__(
        self, host: Host, device: FoundDevice, *, token: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._host, self._device, self._token, self._clock = host, device, token, clock
        self._numbers = itertools.count(1)
        self._talks: dict[int, PlaygroundCall] = {}
        self._waiting: deque[PlaygroundCall] = deque()
        self._running: dict[int, PlaygroundCall] = {}  # asked of the program
        self._program: PlaygroundProgram | None = None
        self._warming = False
        self._yielding = False
        self._asked_at = clock()
        self._news = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None  # of the program before

    # --- callers ------------------------------------------------------------------------------------------------------

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection: a line comes, lines go. Its end withdraws the question."""
        try:
            async with asyncio.timeout(CALL_SECONDS):
                call = Call.model_validate_json(await reader.readline())
            if hmac.compare_digest(call.token.encode(), self._token.encode()):
                await self._serve(call, reader, writer)
        except (ValidationError, ValueError, TimeoutError, ConnectionError) as error:
            log.info("playground.caller_lost", error=type(error).__name__)
        finally:
            writer.close()

    async def _serve(self, call: Call, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talk = PlaygroundCall(next(self._numbers), call, asked_at=self._clock())
        self._accept(talk)
        leaving = asyncio.create_task(reader.read(1))
        try:
            while True:
                saying = asyncio.create_task(talk.answers.get())
                done, _ = await asyncio.wait({saying, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if saying not in done:
                    saying.cancel()
                    return
                answer = saying.result()
                writer.write(answer.model_dump_json().encode() + b"\n")
                await writer.drain()
                if isinstance(answer, Ended | Declined):
                    return
        finally:
            leaving.cancel()
            await self._forget(talk)

    def _accept(self, talk: PlaygroundCall) -> None:
        if len(self._talks) >= self._host.settings.playground_queue:
            talk.decline(
                "playground_busy", f"The playground has {len(self._talks)} questions already. Try again shortly."
            )
        elif self._yielding:
            talk.decline("playground_yields", YIELDS)
        else:
            self._talks[talk.number] = talk
            self._waiting.append(talk)
            self._wake()

    async def _forget(self, talk: PlaygroundCall) -> None:
        talk.gone = True
        self._asked_at = self._clock()
        self._talks.pop(talk.number, None)
        asked = self._running.pop(talk.number, None)
        if asked is not None and not talk.over and self._program is not None:
            await self._program.say(Withdrawn(number=talk.number))
        self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    # --- the order of answers -----------------------------------------------------------------------------------------

    async def conduct(self) -> None:
        """Bring the waiting questions to a program, one after the other, for ever."""
        while True:
            news = self._news
            if not self._waiting:
                await news.wait()
                continue
            talk = self._next()
            try:
                await self._ask(talk)
            except _CallerGone:
                talk.decline("playground_yields", YIELDS)  # if it was not the caller who left
            except TunepoolError as error:
                passing = not isinstance(error, Invalid | NotFound)
                code, message = ("playground_yields", YIELDS) if self._yielding else (error.code, error.message)
                talk.decline(code, message, param=error.param, passing=passing or self._yielding)
            except OSError as error:
                log.exception("playground.failed", talk=talk.number)
                talk.decline("playground_crashed", f"The playground hit an unexpected error ({type(error).__name__}).")

    def _next(self) -> PlaygroundCall:
        """The oldest question; for a while those that the weights in memory answer, or each would swap them."""
        talk = self._waiting[0]
        if self._program is not None and self._clock() - talk.asked_at < OVERTAKEN_SECONDS:
            weights = self._program.weights
            mine = (other for other in self._waiting if HeldWeights.of(other.target, self._device) == weights)
            talk = next(mine, talk)
        self._waiting.remove(talk)
        return talk

    async def _ask(self, talk: PlaygroundCall) -> None:
        def interrupt() -> None:
            if talk.gone or self._yielding:
                raise _CallerGone

        weights = HeldWeights.of(talk.target, self._device)
        while self._program is not None and self._program.weights != weights and self._running:
            news = self._news
            await news.wait()
            if talk.gone:
                return
        if talk.gone or talk.over:
            return
        interrupt()
        program = self._program
        if program is None or program.weights != weights:
            program = await self._warm(talk, weights, interrupt)
        question = talk.question.model_copy(update={"adapter": None, "adapter_path": None})
        if talk.target.adapter is not None and not talk.target.whole and talk.question.adapter is not None:
            folder = await asyncio.to_thread(program.stage, talk.target, interrupt)
            question = question.model_copy(update={"adapter": talk.target.adapter, "adapter_path": str(folder)})
        if talk.gone or talk.over or self._program is not program:
            talk.decline("playground_crashed", "The playground's program ended. Try again.")
            return
        question = question.model_copy(update={"chat_template": talk.target.chat_template})
        self._running[talk.number] = talk
        await program.say(question)

    async def _warm(
        self, talk: PlaygroundCall, weights: HeldWeights, interrupt: Callable[[], None]
    ) -> PlaygroundProgram:
        await self.let_go()
        program = PlaygroundProgram(self._host, weights, number=next(self._numbers), hear=self._hear, ended=self._lost)
        self._program, self._warming = program, True
        begun = self._clock()
        try:
            await program.start(talk.target, self._device, interrupt)
        except BaseException:
            if self._program is program:
                self._program = None
            await program.end()
            raise
        finally:
            self._warming = False
        log.info("playground.warm", base_model=weights.base, seconds=round(self._clock() - begun, 1))
        return program

    def _hear(self, message: Answered | Held) -> None:
        if isinstance(message, Held):
            return
        talk = self._running.get(message.number)
        if talk is None:
            return
        talk.hear(message)
        if isinstance(message, Ended | Declined):
            self._running.pop(message.number, None)
            self._wake()

    def _lost(self, program: PlaygroundProgram) -> None:
        """The program says no more. If that was not our doing, it has crashed."""
        if self._program is program and not self._warming:
            log.error("playground.crashed", base_model=program.weights.base)
            self._program = None
            self._decline_running("playground_crashed", "The playground's program ended in the middle. Try again.")
            self._end_program(program)

    def _decline_running(self, code: str, message: str) -> None:
        for talk in self._running.values():
            talk.decline(code, message)
        self._running.clear()
        self._wake()

    async def let_go(self, code: str = "playground_crashed", message: str = LET_GO) -> None:
        """End the program, if there is one; answers that it owes are declined."""
        program, self._program = self._program, None
        self._decline_running(code, message)
        if program is not None:
            self._end_program(program)
        if self._ending is not None:
            await asyncio.wait([self._ending])

    def _end_program(self, program: PlaygroundProgram) -> None:
        """Whatever descends from this process is killed with a program, so no other starts before that is done."""
        self._ending = asyncio.create_task(program.end())

    # --- others' needs ------------------------------------------------------------------------------------------------

    async def look(self, at: PlaygroundAddress) -> None:
        """Report, and make room: for a training that wants the device, and after a time in which nobody asked."""
        ids = [f"{self._host.worker.host}:{self._device.uuid}"]
        wanted = await asyncio.to_thread(self._host.write, lambda s: playgrounds.pressure(s, device_ids=ids))
        self._yielding = self._must_yield(leased=wanted.leased, waiting_bytes=wanted.waiting_bytes)
        if self._yielding:
            for talk in self._waiting:
                talk.decline("playground_yields", YIELDS)
            self._waiting.clear()
            await self.let_go("playground_yields", YIELDS)
        idle = self._clock() - self._asked_at > self._host.settings.playground_idle_seconds
        if idle and not self._talks and self._program is not None and not self._warming:
            log.info("playground.idle", base_model=self._program.weights.base)
            await self.let_go()
        standing = self.standing
        worker = self._host.worker
        await asyncio.to_thread(
            self._host.write,
            lambda s: playgrounds.report(s, worker.id, host=worker.host, pool=worker.pool, at=at, standing=standing),
        )

    def _must_yield(self, *, leased: bool, waiting_bytes: int) -> bool:
        """A GPU is the trainings' as soon as one wants it; a CPU is shared while there is memory for both."""
        if self._device.kind != "cpu":
            return leased or waiting_bytes > 0
        _, available = devices.host_memory()
        return waiting_bytes > available

    @property
    def standing(self) -> PlaygroundReport:
        """What a look at this playground shows now."""
        program = self._program
        if program is None:
            return PlaygroundReport(state="yielding" if self._yielding else "cold", asked=len(self._talks))
        state: State = "warming" if self._warming else "warm"
        alone = (program.weights.alone,) if program.weights.alone else ()
        return PlaygroundReport(state, program.weights.base, (*alone, *program.adapters), len(self._talks))


# --- the process ------------------------------------------------------------------------------------------------------


async def run(host: Host, over: asyncio.Event, *, ready: Callable[[PlaygroundAddress], None] = lambda _: None) -> None:
    """Serve until `over` is set. Whatever ends, the program ends first."""
    device = next((candidate for candidate in host.devices if candidate.healthy), host.devices[0])
    token = secrets.token_urlsafe(32)
    desk = PlaygroundQueue(host, device, token=token)
    server = await asyncio.start_server(desk.take, host.settings.playground_address, 0, limit=LINE_BYTES)
    at = PlaygroundAddress(host.settings.playground_address, server.sockets[0].getsockname()[1], token)
    conducting = asyncio.create_task(desk.conduct(), name="conduct")
    try:
        while not over.is_set():
            if conducting.done():
                conducting.result()  # it ends by an error alone
            try:
                await desk.look(at)
                ready(at)
            except AWAY as error:
                log.warning("playground.unheard", error=str(error)[:200])
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), host.settings.control_seconds)
    finally:
        server.close()
        conducting.cancel()
        await asyncio.wait([conducting])
        await desk.let_go()
        with contextlib.suppress(*AWAY):
            await asyncio.to_thread(host.write, lambda s: playgrounds.retire(s, host.worker.id, token=token))


def take_place(host: Host) -> IO[str] | None:
    """Become the only playground of this home, and prove that nothing of an earlier one lives; None: there is one."""
    folder = place(host)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = Path(f"{folder}.lock").open("a+")  # noqa: SIM115 -- held until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    processes.kill_orphans(home=host.settings.home.resolve())
    hostile_folder.remove(folder)
    folder.mkdir(mode=0o711)
    return lock


async def _main(host: Host) -> None:
    over = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, over.set)
    log.info("playground.started", device=host.devices[0].uuid)
    await run(host, over)


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    hide_secrets()
    settings = Settings()
    logs.configure(settings)
    processes.adopt_strays()
    host = open_host(settings, flags=SharedFlags())
    lock = take_place(host)
    if lock is None:
        sys.exit(f"A playground already runs in {settings.home.resolve()}.")
    with lock:
        host.write_in_the_end(schema.must_serve)
        asyncio.run(_main(host))


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    main()
