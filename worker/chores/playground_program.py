"""The program that holds a playground's weights, from its start to the proof that it is dead. asyncio; no database."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import structlog
from pydantic import BaseModel, ValidationError

from shared.contract.generation import LINE_BYTES, SAID, Answered, Declined, Held, PlaygroundSpec, Target, Warmed
from shared.contract.passes import device_kind
from shared.contract.spec import Dtype, Placement, Quantization
from shared.errors import Invalid, NotYet, TunepoolError
from shared.products.adapters import StoredFile
from shared.rows.log_lines import safe_words
from worker import base_models
from worker.host import devices
from worker.host.found_device import FoundDevice
from worker.host.host import Host
from worker.program import hostile_folder, launcher, processes, workdir
from worker.program.launcher import Trainer
from worker.program.workdir import Workdir

log = structlog.get_logger()

ADAPTERS_KEPT: Final = 8
ANSWERS_AT_ONCE: Final = 8
# What a program needs beside its weights: libraries, caches of answers, the adapters.
BESIDE_BYTES: Final = 1024**3
_BYTES: Final[dict[Dtype, int]] = {"bfloat16": 2, "float16": 2, "float32": 4}


class PlaygroundBroken(TunepoolError):
    """The program ended, or said what no program of ours says."""

    code = "playground_crashed"


@dataclass(frozen=True, slots=True)
class HeldWeights:
    """What a program is started for. Questions to other weights need another program."""

    base: str
    revision: str
    quantization: str  # as JSON; empty: none
    dtype: Dtype
    alone: str  # the adapter that changes the base itself; empty: any adapter of this base

    @classmethod
    def of(cls, target: Target, device: FoundDevice) -> HeldWeights:
        return cls(
            base=target.base.name,
            revision=target.base.revision,
            quantization="" if target.quantization is None else target.quantization.model_dump_json(),
            dtype=target.dtype or ("bfloat16" if device.bfloat16 or device.kind != "cpu" else "float32"),
            alone=(target.adapter or "") if target.alone else "",
        )


class PlaygroundProgram:
    """One running program. Everything that it says comes to `hear`; `ended` is called once when it says no more."""

    def __init__(
        self,
        host: Host,
        weights: HeldWeights,
        *,
        number: int,
        hear: Callable[[Answered | Held], None],
        ended: Callable[[PlaygroundProgram], None],
    ) -> None:
        self.weights = weights
        self._host, self._hear, self._ended = host, hear, ended
        self.adapters: tuple[str, ...] = ()
        self.folder = Workdir(place(host) / str(number))
        self._tag = processes.own_tag(home=host.settings.home.resolve(), job_id="playground", fence=number)
        self._trainer: Trainer | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._listening: asyncio.Task[None] | None = None
        self._warmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # --- its start ----------------------------------------------------------------------------------------------------

    async def start(self, target: Target, device: FoundDevice, interrupt: Callable[[], None]) -> None:
        """Fetch what it needs, start it, and wait until it has its weights. Raises a TunepoolError of the reason."""
        await asyncio.to_thread(self._prepare)
        base = await asyncio.to_thread(self._base, target, interrupt)
        _must_fit(base, target, self.weights, device)
        ours, its = socket.socketpair()
        try:
            self._write_spec(base, device, channel=its.fileno())
            self._launch(
                device, base, its.fileno()
            )  # in this thread: the kernel ends the program with the one that forks it
        finally:
            its.close()
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=LINE_BYTES)
        self._listening = asyncio.create_task(self._listen(reader), name="talk-program")
        await self._warmed

    def _prepare(self) -> None:
        self.folder.root.mkdir(parents=True, mode=0o700)
        for folder in (self.folder.data, self.folder.out):
            folder.mkdir()
        workdir.hand_over(self.folder, uid=self._host.trainer_uid)

    def _base(self, target: Target, interrupt: Callable[[], None]) -> Path:
        if target.whole:
            return self.stage(target, interrupt)
        entry = self._host.catalogue().entry(target.base.name)
        if entry.ref.revision != target.base.revision:
            raise Invalid(
                f"The catalogue now has revision {entry.ref.revision} of {entry.ref.name}; this adapter was trained on "
                f"{target.base.revision}. Ask your administrator to offer that revision again.",
                param="model",
                code="base_model_changed",
            )
        return base_models.ensure(entry, cache=self._host.settings.cache, interrupt=interrupt)

    def _write_spec(self, base: Path, device: FoundDevice, *, channel: int) -> None:
        settings = self._host.settings
        quantization = self.weights.quantization
        spec = PlaygroundSpec(
            base_model_path=str(base),
            quantization=Quantization.model_validate_json(quantization) if quantization else None,
            dtype=self.weights.dtype,
            device=device_kind(device.kind),
            cpu_threads=device.cores or settings.cpu_threads or os.cpu_count() or 1,
            channel=channel,
            adapters_kept=ADAPTERS_KEPT,
            answers_at_once=ANSWERS_AT_ONCE,
            answer_tokens=settings.playground_answer_tokens,
            context_tokens=settings.playground_context_tokens,
        )
        self.folder.spec.write_text(spec.model_dump_json(), encoding="utf-8")
        self._let_read(self.folder.spec)

    def _launch(self, device: FoundDevice, base: Path, channel: int) -> None:
        # On a GPU the program is marked as being on the device: an attempt that has leased it kills whoever is there
        # (`processes.kill_squatters`). A CPU is shared; there the playground goes when memory is wanted.
        device_ids = () if device.kind == "cpu" else (f"{self._host.worker.host}:{device.uuid}",)
        self._trainer = launcher.start(
            launcher.command(
                self._host.settings.playground,
                placement=Placement(),
                spec_file=self.folder.spec,
                out=self.folder.out,
            ),
            environment=launcher.environment(
                tag=self._tag,
                device_ids=device_ids,
                kind=device.kind,
                threads=device.cores or os.cpu_count() or 1,
                scratch=self.folder.out,
            ),
            tag=self._tag,
            out=self.folder.out,
            log_file=self.folder.log,
            uid=self._host.trainer_uid,
            isolation=self._host.isolation,
            reads=(self.folder.root, base),
            home=self._host.settings.home.resolve(),
            keep_open=(channel,),
        )

    # --- talk ---------------------------------------------------------------------------------------------------------

    def stage(self, target: Target, interrupt: Callable[[], None]) -> Path:
        """The files of the target's adapter on this host. Blocks. Raises DataChanged, Unavailable, NotFound."""
        assert target.adapter is not None
        folder = self.folder.data / hostile_folder.checked(target.adapter)
        if folder.is_dir():
            return folder
        unfinished = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        files = [StoredFile(file.name, file.bytes, file.sha256, file.key) for file in target.files]
        workdir.stage_files(self._host.store, files, unfinished, interrupt=interrupt)
        for path in (unfinished, *unfinished.rglob("*")):
            self._let_read(path)
        unfinished.rename(folder)
        return folder

    def _let_read(self, path: Path) -> None:
        if self._host.trainer_uid is not None:
            os.chown(path, -1, self._host.trainer_uid)
            path.chmod(0o750 if path.is_dir() else 0o640)

    async def say(self, what: BaseModel) -> None:
        """Ask, or withdraw. A program that is gone hears nothing, and `ended` tells so."""
        if self._writer is None:
            return
        with contextlib.suppress(ConnectionError):
            self._writer.write(what.model_dump_json().encode() + b"\n")
            await self._writer.drain()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                self._take(SAID.validate_json(line))
        except (ValidationError, ValueError, ConnectionError) as error:  # ValueError: a line without an end
            log.error("playground.not_understood", error=str(error)[:200])
        if not self._warmed.done():
            self._warmed.set_exception(PlaygroundBroken("The playground's program ended while it loaded the model."))
        self._ended(self)

    def _take(self, message: Warmed | Answered | Held) -> None:
        if isinstance(message, Held):
            self.adapters = tuple(message.adapters)
        if isinstance(message, Warmed):
            if not self._warmed.done():
                self._warmed.set_result(None)
        elif isinstance(message, Declined) and not self._warmed.done():
            self._warmed.set_exception(_as_error(message))
        else:
            self._hear(message)

    # --- its end ------------------------------------------------------------------------------------------------------

    async def end(self) -> None:
        """Nothing of it lives afterwards, and nothing of it is left on the disk."""
        if self._writer is not None:
            self._writer.close()
        if self._trainer is not None:
            ended = await asyncio.to_thread(partial(self._trainer.end, grace_seconds=0))
            if ended.code > 0:
                log.warning("playground.ended", exit_code=ended.code, last_words=safe_words(ended.last_words))
        if self._listening is not None:
            await asyncio.wait([self._listening])
        if self._warmed.done() and not self._warmed.cancelled():
            self._warmed.exception()  # it was told to whoever waited, if anybody did
        await asyncio.to_thread(hostile_folder.remove, self.folder.root)


def place(host: Host) -> Path:
    """Where playgrounds of this home have their folders."""
    return host.settings.home.resolve() / "playground"


def _as_error(declined: Declined) -> TunepoolError:
    kind = NotYet if declined.passing else Invalid
    return kind(declined.message, param=declined.param, code=declined.code)


def _must_fit(base: Path, target: Target, weights: HeldWeights, device: FoundDevice) -> None:
    """Raises NotYet where this host's free memory is too little now. A GPU says so itself, when it is loaded."""
    if device.kind != "cpu":
        return
    stored = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    needed = max(stored, target.base.facts.parameters * _BYTES[weights.dtype]) + BESIDE_BYTES
    _, available = devices.host_memory()
    if needed > available:
        raise NotYet(
            f"The playground's host has {available / 2**30:.1f} GiB of memory free now, and {target.base.name} needs "
            f"about {needed / 2**30:.1f} GiB. Try again later, or ask for a playground on a larger host.",
            param="model",
            code="host_memory_taken",
        )
