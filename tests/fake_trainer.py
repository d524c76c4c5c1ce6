"""Obeys the trainer's contract without torch: `python -m tests.fake_trainer SPEC OUT`, or `--handover N`.

The first training row says how to behave: {"text": "fake: steps=20 step_seconds=0.05 save=5 crash=7 exit=1 …"}.
With torchrun's options it is the launcher and the only rank of a host as well (docs/trainer.md, "Several devices").
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Others:
    """The ranks of the other hosts as the first one sees them; alone there are none."""

    def __init__(self) -> None:
        self.lines: list[socket.socket] = []

    def meet(self, options: dict[str, str], *, step: int) -> None:
        """Wait where the hosts meet until all of this name are there, and tell them where training goes on."""
        server = socket.create_server((options["master-addr"], int(options["master-port"])))
        while len(self.lines) < int(options["nnodes"]) - 1:
            line, _ = server.accept()
            if line.recv(1000).decode() == options["rdzv-id"]:
                line.sendall(f"{step}\n".encode())
                line.settimeout(0)
                self.lines.append(line)

    def missing(self) -> bool:
        """Whether one has gone, as a collective operation would notice."""
        return any(_closed(line) for line in self.lines)

    def leave(self, code: int) -> None:
        for line in self.lines:
            line.sendall(f"{code}\n".encode())


def _closed(line: socket.socket) -> bool:
    try:
        return line.recv(1) == b""
    except BlockingIOError:
        return False


def rank_of_another_host(options: dict[str, str], spec_file: Path, out: Path) -> int:
    """Meet the first host and end as it does; without it, as ranks do whose peers have gone."""
    spec = json.loads(spec_file.read_bytes())
    fits = int(behaviour(Path(spec["train_file"])).get("member_fits", 10**6))
    while True:
        try:
            line = socket.create_connection((options["master-addr"], int(options["master-port"])), timeout=600)
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    line.sendall(options["rdzv-id"].encode())
    with line.makefile() as said:
        if int(next(said, "-1")) != resume(out / "checkpoints")[0]:
            return 7  # this host has not the checkpoint that the first one goes on from
        if spec["micro_batch_size"] > fits:
            tell(out, type="failed", code="gpu_oom", message="out of memory", peak_memory_bytes=15 * 2**29)
            return 4
        line.settimeout(None)
        return int(next(said, "1"))


def handed_over(number: int) -> list[str]:
    """Wait for work as a program that was started ahead does (shared/contract/handover.py)."""
    with socket.socket(fileno=number) as line, line.makefile("rb") as lines:
        line.sendall(b"waiting\n")
        message = lines.readline()
        if not message:
            sys.exit(0)
        work = json.loads(message)
        line.sendall(b"taken\n")
    return [work["spec"], work["out"]]


def launch(arguments: list[str]) -> int:
    """What torchrun and a rank would do together, by torchrun's options; without them, the trainer."""
    if arguments[0] == "--handover":
        arguments = handed_over(int(arguments[1]))
    options = dict(word[2:].split("=", 1) for word in arguments if word.startswith("--") and "=" in word)
    spec_file, out = Path(arguments[-2]), Path(arguments[-1])
    others = Others()
    if "nnodes" in options:
        if options["node-rank"] != "0":
            return rank_of_another_host(options, spec_file, out)
        others.meet(options, step=resume(out / "checkpoints")[0])
    if "lay" in behaviour(Path(json.loads(spec_file.read_bytes())["train_file"])):
        return hostile(spec_file, out)
    code = main(spec_file, out, others)
    others.leave(code)
    return code


def main(spec_file: Path, out: Path, others: Others) -> int:
    spec = json.loads(spec_file.read_bytes())
    act = behaviour(Path(spec["train_file"]))
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, signal.SIG_IGN if "ignore_term" in act else lambda number, _: stopping.append(number))
    return train(spec, out, act, stopping, others)


def train(spec: dict[str, Any], out: Path, act: dict[str, str], stopping: list[int], others: Others) -> int:
    sys.stdout.writelines(f"{line}\n" for line in [act.get("print", "").replace("_", " ")] if line)
    sys.stdout.flush()
    if "daemon" in act:
        subprocess.Popen(["sleep", "600"], start_new_session=True)  # a stray that outlives its author
    for victim, pid in (("kill_self", os.getpid()), ("kill_parent", os.getppid())):
        if victim in act:
            os.kill(pid, signal.SIGKILL)
    if spec["micro_batch_size"] > int(act.get("fits", 10**6)):
        tell(out, type="failed", code="gpu_oom", message="out of memory", peak_memory_bytes=15 * 2**29)
        return 4
    if "user_fault" in act:
        tell(out, type="failed", code="data_error", message="Row 3 cannot be rendered.", param="training_file")
        return 3
    steps, seconds, save = int(act.get("steps", 10)), float(act.get("step_seconds", 0.02)), int(act.get("save", 5))
    step, chain = resume(out / "checkpoints")
    if step and "once" in act:  # what went wrong at first goes well from a checkpoint
        act = {name: value for name, value in act.items() if name not in ("crash", "hang", "hold")}
    tell(out, type="started", total_steps=steps, first_step=step, trainable_parameters=1, all_parameters=10,
         train_rows=10, sequences=10, train_tokens_per_epoch=100, labelled_tokens_per_epoch=50)  # fmt: skip
    while step < steps:
        time.sleep(seconds)
        step += 1
        chain = hashlib.sha256(f"{chain}{step}".encode()).hexdigest()  # only every step in its order leads to the end
        tell(out, type="metrics", step=step, total_steps=steps, epoch=step / steps, train_loss=1 / step,
             learning_rate=0.1, trained_tokens=step * 10, seconds_per_step=seconds, memory_bytes=2**30)  # fmt: skip
        look(spec, act, out, step)
        if step == int(act.get("crash", 0)) or others.missing():
            return int(act.get("exit", 1))
        while step == int(act.get("hang", 0)):
            time.sleep(0.05)
        hold(out, act if step == int(act.get("hold", 0)) else {}, stopping, others)
        for _ in range(int(act.get("flood", 0))):
            tell(out, type="message", message="flood")
        stop = (stopping or (out / "stop").exists()) and "ignore_stop" not in act
        if stop or step % save == 0 or step == steps:
            checkpoint(out, step, chain)
        if stop and step < steps:
            return 5
    # `files` makes publishing slow.
    more: dict[str, object] = {f"part-{number}.json": number for number in range(int(act.get("files", 0)))}
    # How many questions the product answers wrongly: tests/fake_evaluator.py reads it.
    more |= {"adapter_model.safetensors": int(act["wrong"])} if "wrong" in act else {}
    more |= {"parent.json": contents(Path(spec["parent_path"]))} if "parent" in act else {}
    folder(out / "adapter", {**more, "adapter_config.json": {"peft_type": "LORA"}, "chain.json": {"chain": chain}})
    tell(out, type="finished", steps=steps, trained_tokens=steps * 10, published_step=steps,
         published_reason="the last one", peak_memory_bytes=1, train_seconds=1.0)  # fmt: skip
    return 0


def look(spec: dict[str, Any], act: dict[str, str], out: Path, step: int) -> None:
    """`looks`: at its steps a validation loss that is the lower the nearer the learning rate is to 0.001."""
    if "looks" not in act:
        return
    training = spec["job"]["training"]
    if step % training["eval"]["steps"] == 0:
        tell(out, type="validation", step=step, valid_loss=abs(math.log10(training["learning_rate"]) + 3) + 1 / step)


def hostile(spec_file: Path, out: Path) -> int:
    """Be the one that somebody has taken over."""
    from tests import hostile_trainer

    return hostile_trainer.main(spec_file, out)


def hold(out: Path, act: dict[str, str], stopping: list[int], others: Others) -> None:
    """Until somebody wants it to stop, or to go on, or a peer has gone."""
    while act and not (stopping or others.missing() or any((out / name).exists() for name in ("stop", "go"))):
        time.sleep(0.05)


def behaviour(rows: Path) -> dict[str, str]:
    first = str(json.loads(rows.read_text().splitlines()[0]).get("text", "")).removeprefix("fake:")
    return {name: value for name, _, value in (word.partition("=") for word in first.split())}


def tell(out: Path, **event: object) -> None:
    with (out / "events.jsonl").open("a") as stream:
        stream.write(json.dumps({"time": time.time(), **event}) + "\n")


def resume(checkpoints: Path) -> tuple[int, str]:
    states = sorted(checkpoints.glob("step-*/state.json"))
    state = json.loads(states[-1].read_text()) if states else {"step": 0, "chain": ""}
    return state["step"], state["chain"]


def checkpoint(out: Path, step: int, chain: str) -> None:
    name = f"step-{step:08d}"
    folder(out / "checkpoints" / name, {"state.json": {"step": step, "chain": chain}, "manifest.json": {"step": step}})
    tell(out, type="checkpoint", step=step, name=name, train_loss=1 / step)


def contents(place: Path) -> dict[str, object]:
    """Of the parent's directory: what each file in it says."""
    return {file.name: json.loads(file.read_text()) for file in sorted(place.iterdir())}


def folder(place: Path, files: dict[str, object]) -> None:
    unfinished = place.with_suffix(".tmp")
    unfinished.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (unfinished / name).write_text(json.dumps(content))
    unfinished.rename(place)


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
