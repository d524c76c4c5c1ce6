"""Obeys the trainer's contract without torch: `python -m tests.fake_trainer SPEC OUT`.

The first training row says how to behave: {"text": "fake: steps=20 step_seconds=0.05 save=5 crash=7 exit=1 …"}.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main(spec_file: Path, out: Path) -> int:
    spec = json.loads(spec_file.read_bytes())
    act = behaviour(Path(spec["train_file"]))
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, signal.SIG_IGN if "ignore_term" in act else lambda number, _: stopping.append(number))
    if "daemon" in act:
        subprocess.Popen(["sleep", "600"], start_new_session=True)  # a stray that outlives its author
    if "kill_self" in act:
        os.kill(os.getpid(), signal.SIGKILL)
    if "kill_parent" in act:
        os.kill(os.getppid(), signal.SIGKILL)
    if spec["micro_batch_size"] > int(act.get("fits", 10**6)):
        tell(out, type="failed", code="gpu_oom", message="out of memory", peak_memory_bytes=15 * 2**29)
        return 4
    if "user_fault" in act:
        tell(out, type="failed", code="data_error", message="Row 3 cannot be rendered.", param="training_file")
        return 3
    steps, seconds, save = int(act.get("steps", 10)), float(act.get("step_seconds", 0.02)), int(act.get("save", 5))
    step, chain = resume(out / "checkpoints")
    if step and "once" in act:  # what went wrong at first goes well from a checkpoint
        act = {name: value for name, value in act.items() if name not in ("crash", "hang")}
    tell(out, type="started", total_steps=steps, first_step=step, trainable_parameters=1, all_parameters=10,
         train_rows=10, sequences=10, train_tokens_per_epoch=100, labelled_tokens_per_epoch=50)  # fmt: skip
    while step < steps:
        time.sleep(seconds)
        step += 1
        chain = hashlib.sha256(f"{chain}{step}".encode()).hexdigest()  # only every step in its order leads to the end
        tell(out, type="metrics", step=step, total_steps=steps, epoch=step / steps, train_loss=1 / step,
             learning_rate=0.1, trained_tokens=step * 10, seconds_per_step=seconds)  # fmt: skip
        if step == int(act.get("crash", 0)):
            return int(act.get("exit", 1))
        while step == int(act.get("hang", 0)):
            time.sleep(0.05)
        for _ in range(int(act.get("flood", 0))):
            tell(out, type="message", message="flood")
        stop = (stopping or (out / "stop").exists()) and "ignore_stop" not in act
        if stop or step % save == 0 or step == steps:
            checkpoint(out, step, chain)
        if stop and step < steps:
            return 5
    more = {f"part-{number}.json": number for number in range(int(act.get("files", 0)))}  # makes publishing slow
    folder(out / "adapter", {**more, "adapter_config.json": {"peft_type": "LORA"}, "chain.json": {"chain": chain}})
    tell(out, type="finished", steps=steps, trained_tokens=steps * 10, published_step=steps,
         published_reason="the last one", peak_memory_bytes=1, train_seconds=1.0)  # fmt: skip
    return 0


def behaviour(rows: Path) -> dict[str, str]:
    first = json.loads(rows.read_text().splitlines()[0])["text"].removeprefix("fake:")
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


def folder(place: Path, files: dict[str, object]) -> None:
    unfinished = place.with_suffix(".tmp")
    unfinished.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (unfinished / name).write_text(json.dumps(content))
    unfinished.rename(place)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
