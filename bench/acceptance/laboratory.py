"""Random models of real shapes, jobs on them, and the trainer: in this process, or as the program that a worker starts.

Nothing is fetched: weights are drawn from a config on the device itself.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from shared.contract.base_facts import ModelFacts
from shared.contract.events import EXIT_OUT_OF_MEMORY, TrainerEvent
from shared.contract.spec import AttemptSpec
from shared.settings import trainer_environment
from shared.settle.model_facts import facts_of
from tests.train.tiny import chat, make_spec, make_tokenizer, read_events, run
from worker.program.native_memory import settled_code

DeviceName = Literal["cuda", "cpu"]
Shape = Literal["tiny", "1b", "8b"]

# hidden, feed-forward, layers, heads, key-value heads, vocabulary, tied: config.json of Llama 3.2 1B and Llama 3.1 8B.
SHAPES: Final[dict[Shape, tuple[int, int, int, int, int, int, bool]]] = {
    "tiny": (64, 128, 2, 4, 2, 260, True),
    "1b": (2048, 8192, 16, 32, 8, 128_256, True),
    "8b": (4096, 14336, 32, 32, 8, 128_256, False),
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `ok` is None where a figure is only told."""

    name: str
    value: Any
    must: str = ""
    ok: bool | None = None


def near(name: str, value: float, exact: float, *, relative: float) -> Check:
    return Check(name, value, f"{exact:.6g} ± {relative:g}", abs(value - exact) <= relative * max(abs(exact), 1e-12))


def within(name: str, value: float, most: float) -> Check:
    return Check(name, value, f"<= {most:g}", value <= most)


class OutOfTime(Exception):
    """The section's time is used up."""


@dataclass
class Clock:
    """The time of one section."""

    seconds: float
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    def check(self) -> None:
        if self.left <= 0:
            raise OutOfTime(f"after {self.seconds:g} s")


@dataclass(frozen=True)
class Outcome:
    """How a run of the trainer ended."""

    code: int
    events: list[TrainerEvent]
    words: str = ""

    @property
    def losses(self) -> list[float]:
        """Training loss, step by step; a later attempt's figure replaces an earlier one's."""
        by_step = {event.step: event.train_loss for event in self.events if event.type == "metrics"}
        return [by_step[step] for step in sorted(by_step)]

    def last(self, kind: str) -> Any:
        return next(event for event in reversed(self.events) if event.type == kind)

    def says(self, code: str) -> bool:
        """Whether it failed with that code, or native code ended it before it could say so."""
        failed = [event for event in self.events if event.type == "failed"]
        return failed[-1].code == code if failed else self.code == EXIT_OUT_OF_MEMORY


@dataclass
class Laboratory:
    """One device and a folder to work in."""

    device: DeviceName
    folder: Path
    figures: dict[str, float] = field(default_factory=dict)  # what one section finds and a later one uses
    _models: dict[Shape, Path] = field(default_factory=dict)
    _runs: int = 0

    @property
    def small(self) -> bool:
        """On a processor everything is tiny: there the acceptance only shows that it runs through."""
        return self.device == "cpu"

    def shapes(self) -> tuple[Shape, ...]:
        return ("tiny",) if self.small else ("1b", "8b")

    def model(self, shape: Shape) -> Path:
        """A folder with random weights of that shape, made once."""
        if shape not in self._models:
            tokenizer = make_tokenizer()
            place = self.folder / f"model-{shape}"
            torch.manual_seed(0)
            with torch.device(self.device):
                made = AutoModelForCausalLM.from_config(
                    _config(shape, tokenizer), dtype=torch.float32 if shape == "tiny" else torch.bfloat16
                )
            made.save_pretrained(place)
            tokenizer.save_pretrained(place)
            self._models[shape] = place
            del made
            self.forget()
        return self._models[shape]

    def facts(self, shape: Shape) -> ModelFacts:
        config = _config(shape, make_tokenizer()).to_dict()
        return facts_of(config | {"architectures": ["LlamaForCausalLM"]}, name=shape)

    def job(self, name: str, *, shape: Shape = "tiny", device: DeviceName | None = None, **parts: Any) -> Path:
        """Write a spec of an attempt on `device`; `parts` as `tests.train.tiny.make_spec` takes them."""
        self._runs += 1
        place = self.folder / f"{self._runs:03d}-{name}"
        place.mkdir()
        model = parts.pop("model", None) or self.model(shape)
        file = make_spec(place, model=model, device=device or self.device, **parts)
        if shape != "tiny":
            spec = AttemptSpec.model_validate_json(file.read_bytes())
            base = spec.job.base_model.model_copy(update={"facts": self.facts(shape)})
            job = spec.job.model_copy(update={"base_model": base})
            file.write_text(spec.model_copy(update={"job": job}).model_dump_json(), encoding="utf-8")
        return file

    def train(self, name: str, **parts: Any) -> Outcome:
        """Run in this process; seconds are saved, and memory is not measured."""
        return self.rerun(self.job(name, **parts))

    def rerun(self, spec: Path) -> Outcome:
        try:
            code, events = run(spec, spec.parent / "out")
            return Outcome(code, events)
        finally:
            self.forget()

    def train_apart(self, name: str, *, clock: Clock, **parts: Any) -> Outcome:
        """Run as a process of its own, as workers do: it has its own context, caches and peak."""
        return self.rerun_apart(self.job(name, **parts), clock=clock)

    def rerun_apart(self, spec: Path, *, clock: Clock, argv: list[str] | None = None) -> Outcome:
        with self.started(spec, argv) as process:
            try:
                words = process.communicate(timeout=max(1.0, clock.left))[0]
            except subprocess.TimeoutExpired as error:
                process.kill()
                raise OutOfTime(f"{spec.parent.name} after {clock.seconds:g} s") from error
        out = spec.parent / "out"
        events = read_events(out) if (out / "events.jsonl").exists() else []
        return Outcome(settled_code(process.returncode, words), events, words[-500:])

    def started(self, spec: Path, argv: list[str] | None = None) -> subprocess.Popen[str]:
        """The trainer (or another program that ends as it does) as a process that the caller waits for."""
        out = spec.parent / "out"
        out.mkdir(exist_ok=True)
        visible = {} if self.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(
            argv or [sys.executable, "-m", "worker.train", str(spec), str(out)],
            cwd=Path(__file__).parents[2],
            env=trainer_environment(HOME=str(self.folder), USER="acceptance", **visible),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def forget(self) -> None:
        """Give back what no tensor holds any more."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def _config(shape: Shape, tokenizer: Any) -> LlamaConfig:
    hidden, feed, layers, heads, kv, vocabulary, tied = SHAPES[shape]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=feed,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
        initializer_range=0.1 if shape == "tiny" else 0.02,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def rows_of(tokens: int, count: int) -> list[dict[str, Any]]:
    """Chat rows of about so many tokens each: the tokenizer has one per byte."""
    half = max(1, (tokens - 40) // 2)
    return [chat(f"{number:04d}" + "q" * half, f"{number:04d}" + "a" * half) for number in range(count)]


def farthest(found: Iterable[float], expected: Iterable[float]) -> float:
    """The largest relative difference of two curves; infinite where their lengths differ."""
    pairs = list(zip(list(found), list(expected), strict=False))
    return max((abs(a - b) / max(abs(b), 1e-9) for a, b in pairs), default=float("inf"))


def user_of_nobody() -> int | None:
    """A uid without rights to run as, where we are root."""
    return 64998 if os.geteuid() == 0 else None
