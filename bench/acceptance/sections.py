"""What a GPU must show, section by section. Each takes the laboratory and its clock, and yields what it looked at."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import psutil
import torch

from bench.acceptance.laboratory import Check, Clock, Laboratory, farthest, near, rows_of, user_of_nobody, within
from shared.contract.events import EXIT_DONE, EXIT_OUT_OF_MEMORY, EXIT_STOPPED, EXIT_USER_FAULT
from shared.contract.spec import AttemptSpec, Placement
from shared.operating.trainer_user import reaches
from shared.settings import Settings
from shared.settle.memory_fit import peak
from shared.settle.workload import workload
from tests.train.families import FAMILIES, make_family
from tests.train.tiny import chat_rows, kto_rows, preference_rows
from worker.host import nvml
from worker.host.devices import discover
from worker.host.nvml import XidWatch
from worker.host.probing import try_device
from worker.program import launcher
from worker.train.base_model import load_model
from worker.train.fused_lora import _LoraStep

GIB: Final = 1 << 30
Section = Callable[[Laboratory, Clock], Iterator[Check]]


def machine(lab: Laboratory, _clock: Clock) -> Iterator[Check]:
    """Versions, and the two ceilings: bandwidth and product."""
    yield Check("python", sys.version.split()[0])
    yield Check("torch", torch.__version__)
    yield Check("driver", getattr(nvml.driver(), "version", None))
    yield Check("gcc", shutil.which("gcc"))
    yield Check("Python.h", (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file())
    if lab.device == "cuda":
        yield Check("device", torch.cuda.get_device_name(0))
        yield Check("capability", list(torch.cuda.get_device_capability(0)))
        yield Check("architectures", torch.cuda.get_arch_list())
        free, total = torch.cuda.mem_get_info()
        # Nobody else is on the device: what is neither free nor ours is a context, and each process has one.
        lab.figures["context"] = total - free - torch.cuda.memory_reserved()
        yield Check("context_bytes", lab.figures["context"])
    yield Check("copy_gb_per_second", _bandwidth(lab) / 1e9)
    lab.figures["flops"] = _product(lab)
    yield Check("product_tflops", lab.figures["flops"] / 1e12)
    lab.forget()


def _bandwidth(lab: Laboratory) -> float:
    """Bytes per second read and written."""
    block = torch.ones((1 << 20) if lab.small else (1 << 30), dtype=torch.bfloat16, device=lab.device)
    other = torch.empty_like(block)
    return 2 * block.nbytes / _timed(lab, lambda: other.copy_(block))


def _product(lab: Laboratory) -> float:
    """Operations per second of a product in bfloat16."""
    size = 256 if lab.small else 8192
    square = torch.ones(size, size, dtype=torch.bfloat16, device=lab.device)
    return 2 * size**3 / _timed(lab, lambda: square @ square)


def _timed(lab: Laboratory, work: Callable[[], Any], *, times: int = 5) -> float:
    """Seconds of one run, the best of some."""
    best = float("inf")
    for _ in range(times):
        _wait(lab)
        began = time.perf_counter()
        work()
        _wait(lab)
        best = min(best, time.perf_counter() - began)
    return best


def _wait(lab: Laboratory) -> None:
    if lab.device == "cuda":
        torch.cuda.synchronize()


def devices(lab: Laboratory, _clock: Clock) -> Iterator[Check]:
    """NVML's view beside torch's; a ballast of another process is a stranger's, our own child's is not."""
    settings = Settings(home=lab.folder / "home", devices="all" if lab.device == "cuda" else "cpu")
    found = discover(settings)
    yield Check("devices", [one.uuid for one in found], "healthy", all(one.healthy for one in found))
    if lab.device == "cpu":
        return
    yield Check("xids", XidWatch().look(), "none", not XidWatch().look())
    known = torch.cuda.is_bf16_supported(including_emulation=False)
    yield Check("bfloat16", found[0].bfloat16, "as torch", found[0].bfloat16 == known)
    yield near("total_bytes", found[0].total_bytes, torch.cuda.mem_get_info()[1], relative=0.03)
    with ballast(2 * GIB) as child:
        alone = discover(settings)[0]
        ours = discover(settings, own_pids={child.pid})[0]
        yield Check("ballast_foreign", alone.foreign_bytes, ">= 2 GiB, or no process is seen", _is_foreign(alone))
        ours_is_none = ours.foreign_bytes <= max(0, alone.foreign_bytes - 2 * GIB)
        yield Check("ballast_ours", ours.foreign_bytes, "less, or no process is seen", ours_is_none)


def _is_foreign(device: Any) -> bool:
    return device.foreign_bytes >= 2 * GIB or device.foreign_bytes == 0


class ballast:  # noqa: N801 -- used as a verb
    """Another process that holds so many bytes of the GPU."""

    def __init__(self, count: int) -> None:
        program = f"import torch,sys; x = torch.empty({count}, dtype=torch.uint8, device='cuda'); print(flush=True); "
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{program}sys.stdin.read()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self) -> subprocess.Popen[bytes]:
        assert self.process.stdout is not None
        self.process.stdout.readline()
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def isolation(lab: Laboratory, _clock: Clock) -> Iterator[Check]:
    """The probe as the worker starts it: in the trainer's environment, as ourselves and as a user without rights."""
    settings = Settings(home=lab.folder / "home", devices="all" if lab.device == "cuda" else "cpu")
    device = discover(settings)[0]
    users: list[int | None] = [None]
    nobody = None if lab.small else user_of_nobody()
    if nobody is not None:
        lab.folder.chmod(
            0o755
        )  # it must reach the interpreter, our code and this folder; where not, a worker stays root
        if reaches(nobody, lab.folder):
            users.append(nobody)
        else:
            yield Check(
                f"probe_as_{nobody}", "cannot read the interpreter or our code", "a worker stays root here", None
            )
    for uid in users:
        driver = nvml.driver() if lab.device == "cuda" else None
        outcome = try_device(device, settings=settings, uid=uid, driver=driver)
        yield Check(
            f"probe_as_{'self' if uid is None else uid}",
            outcome.ailment or outcome.summary,
            "no ailment",
            not outcome.ailment,
        )


_EVERY_METHOD: Final = ("lora", "qlora", "dora", "qdora", "full")


def methods(lab: Laboratory, clock: Clock) -> Iterator[Check]:
    """Curves on the device against those of the processor, both in float32; float16 and bfloat16 against float32."""
    adapters = ("qlora",) if lab.small else _EVERY_METHOD
    for method in adapters:
        for packing in (True,) if lab.small else (True, False):
            for recompute in (False,) if lab.small else (False, True):
                clock.check()
                parts = _curve(method, packing=packing, recompute=recompute)
                ours, theirs = lab.train(method, **parts), lab.train(method, device="cpu", **parts)
                name = f"{method}{'_packed' if packing else ''}{'_ckpt' if recompute else ''}"
                yield within(name, farthest(ours.losses, theirs.losses), 1e-3)
    for objective, rows, data_format in (("dpo", preference_rows(8), "preference"), ("kto", kto_rows(8), "kto")):
        if lab.small:
            return
        clock.check()
        parts = {"rows": rows, "data_format": data_format, "objective": {"type": objective}}
        ours, theirs = lab.train(objective, **parts), lab.train(objective, device="cpu", **parts)
        yield within(objective, farthest(ours.losses, theirs.losses), 1e-3)
    exact = lab.train("float32", **_curve("lora"))
    for dtype in ("bfloat16", "float16"):
        rough = lab.train(dtype, **_curve("lora", dtype=dtype))
        yield within(dtype, farthest(rough.losses, exact.losses), 0.02)


def _curve(method: str, *, packing: bool = True, recompute: bool = False, **training: Any) -> dict[str, Any]:
    return {
        "adapter": {"method": method},
        "training": {"packing": packing, "num_train_epochs": 1, **training},
        "gradient_checkpointing": recompute,
    }


def layers(lab: Laboratory, _clock: Clock) -> Iterator[Check]:
    """Packed rows do not see each other; our fused step has the gradients of plain arithmetic in float64."""
    packed, apart = (
        lab.train(name, rows=chat_rows(8), training={"num_train_epochs": 1, "batch_size": 8, "packing": packing})
        for name, packing in (("packed", True), ("apart", False))
    )
    yield within("packed_against_apart", farthest(packed.losses[:1], apart.losses[:1]), 1e-4)
    for name, value in _fused_errors(lab).items():
        yield within(f"fused_{name}", value, 1e-2)


def _fused_errors(lab: Laboratory) -> dict[str, float]:
    torch.manual_seed(0)
    sizes = {"x": (256, 128), "a": (8, 128), "b": (96, 8), "w": (96, 128)}
    exact = {name: torch.randn(*size, dtype=torch.float64) / size[-1] ** 0.5 for name, size in sizes.items()}
    leaves = {name: exact[name].clone().requires_grad_() for name in "xab"}
    plain = leaves["x"] @ exact["w"].T + 2.0 * (leaves["x"] @ leaves["a"].T) @ leaves["b"].T
    plain.square().sum().backward()
    frozen = exact["w"].to(lab.device, torch.bfloat16)
    layer = SimpleNamespace(expanded=lambda: frozen, base_layer=SimpleNamespace(bias=None))
    inputs = {
        name: exact[name].to(lab.device, torch.bfloat16 if name == "x" else torch.float32).requires_grad_()
        for name in "xab"
    }
    fused = _LoraStep.apply(inputs["x"], inputs["a"], inputs["b"], layer, 2.0)
    fused.float().square().sum().backward()
    errors = {"output": _error(fused, plain)}
    return errors | {f"gradient_{name}": _error(inputs[name].grad, leaves[name].grad) for name in "xab"}


def _error(found: torch.Tensor | None, exact: torch.Tensor | None) -> float:
    assert found is not None
    assert exact is not None
    return float((found.detach().cpu().double() - exact.detach()).norm() / exact.detach().norm())


def loading(lab: Laboratory, _clock: Clock) -> Iterator[Check]:
    """The largest model from files to 4 bits on the device."""
    shape = lab.shapes()[-1]
    began = time.perf_counter()
    weights = lab.model(shape)
    yield Check("written_seconds", time.perf_counter() - began)
    yield Check("written_bytes", sum(file.stat().st_size for file in weights.glob("*.safetensors")))
    spec = AttemptSpec.model_validate_json(lab.job("load", shape=shape, **real(lab)).read_bytes())
    before = psutil.Process().memory_info().rss
    if lab.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    model = load_model(spec, weights=weights, quantized=True, trains_in_full=False)
    _wait(lab)
    yield Check("loaded_seconds", time.perf_counter() - began)
    if lab.device == "cuda":
        yield within("host_gb", (psutil.Process().memory_info().rss - before) / 1e9, 4.0)
        yield within("device_peak_gb", torch.cuda.max_memory_allocated() / 1e9, 8.0)
    del model
    lab.forget()


def real(
    lab: Laboratory, *, length: int = 2048, rows: int = 32, row_tokens: int = 300, **training: Any
) -> dict[str, Any]:
    """A QLoRA of the usual kind; tiny on a processor."""
    if lab.small:
        length, rows, row_tokens = 256, 8, 60
    return {
        "rows": rows_of(row_tokens, rows),
        "adapter": {"method": "qlora", "r": 16},
        "quantization": {"bnb_4bit_compute_dtype": "bfloat16"},
        "training": {
            "dtype": "bfloat16",
            "max_length": length,
            "num_train_epochs": 1,
            "batch_size": rows // 2,
            "optim": "adamw_torch",
            **training,
        },
        "micro_batch_size": 4,
    }


def speed(lab: Laboratory, clock: Clock) -> Iterator[Check]:
    """Tokens per second and the share of the measured product, with and without recomputing."""
    for shape in lab.shapes():
        for recompute in (False, True):
            clock.check()
            name = f"{shape}{'_ckpt' if recompute else ''}"
            parts = {**real(lab, rows=128), "gradient_checkpointing": recompute}
            # On a processor in this process: the import alone takes longer than the run.
            ended = (
                lab.train(name, shape=shape, **parts)
                if lab.small
                else lab.train_apart(name, shape=shape, clock=clock, **parts)
            )
            if ended.code != EXIT_DONE:
                yield Check(name, ended.words, "exit 0", ok=False)
                continue
            done, started = ended.last("finished"), ended.last("started")
            rate = done.trained_tokens / done.train_seconds
            yield Check(f"{name}_tokens_per_second", rate)
            # Forward and the gradients of activations: frozen weights have none of their own (2 + 2 per weight).
            work = (6 if recompute else 4) * started.all_parameters * rate
            share = work / lab.figures.get("flops", float("inf"))
            yield Check(
                f"{name}_mfu", share, "" if lab.small else ">= 0.45 (8b)", None if shape != "8b" else share >= 0.45
            )


def memory(lab: Laboratory, clock: Clock) -> Iterator[Check]:
    """Peaks against the estimate."""
    lengths = (256,) if lab.small else (512, 2048, 8192)
    for shape in lab.shapes():
        for method in ("qlora",) if lab.small else ("lora", "qlora"):
            for length in lengths:
                for recompute in (True,) if lab.small else (False, True):
                    clock.check()
                    yield _against_estimate(lab, clock, shape, method=method, length=length, recompute=recompute)


def _against_estimate(lab: Laboratory, clock: Clock, shape: Any, *, method: str, length: int, recompute: bool) -> Check:
    name = f"{shape}_{method}_{length}{'_ckpt' if recompute else ''}"
    parts = real(lab, length=length, rows=4, row_tokens=length - 8) | {"gradient_checkpointing": recompute}
    parts["adapter"] = {"method": method, "r": 16}
    file = lab.job(name, shape=shape, **parts)
    ended = lab.rerun(file) if lab.small else lab.rerun_apart(file, clock=clock)
    if ended.code not in {EXIT_DONE, EXIT_OUT_OF_MEMORY}:
        return Check(name, ended.words, "exit 0 or 4", ok=False)
    spec = AttemptSpec.model_validate_json(file.read_bytes()).job
    total = psutil.virtual_memory().total if lab.small else torch.cuda.mem_get_info()[1]
    predicted = peak(workload(spec, device=lab.device, memory=total)).total
    if ended.code == EXIT_OUT_OF_MEMORY:
        return Check(name, "out of memory", "where the estimate says so", predicted > 0.9 * total)
    measured = ended.last("finished").peak_memory_bytes
    figures = {"predicted": predicted, "measured": measured, "ratio": round(predicted / measured, 3)}
    return Check(
        name, figures, "" if lab.small else "ratio 0.9 to 1.2", None if lab.small else 0.9 <= figures["ratio"] <= 1.2
    )


def exhaustion(lab: Laboratory, clock: Clock) -> Iterator[Check]:
    """Too little memory ends in exit 4 with its code, and the memory is back at once."""
    if lab.small:
        short = lab.train_apart("short", clock=clock, memory_limit_bytes=1 << 20)
        yield Check("exit", short.code, "4", short.code == EXIT_OUT_OF_MEMORY)
        yield Check("code", short.words[-200:], "host_oom", short.says("host_oom"))
        return
    free = torch.cuda.mem_get_info()[0]
    with ballast(free - 3 * GIB):
        short = lab.train_apart("short", shape="1b", clock=clock, **real(lab, length=8192, row_tokens=8000, rows=8))
    yield Check("exit", short.code, "4", short.code == EXIT_OUT_OF_MEMORY)
    yield Check("code", short.words[-200:], "gpu_oom", short.says("gpu_oom"))
    began = time.monotonic()
    while torch.cuda.mem_get_info()[0] < free - GIB and time.monotonic() - began < 10:
        time.sleep(0.05)
    yield within("seconds_until_free", time.monotonic() - began, 1.0)


def resuming(lab: Laboratory, clock: Clock) -> Iterator[Check]:
    """A stopped run ends as one that was not, with each optimizer."""
    optimizers = ("adamw_torch",) if lab.small else ("adamw_torch", "adamw_8bit", "paged_adamw_8bit")
    for optim in optimizers:
        clock.check()
        parts = _curve("qlora", optim=optim)
        whole = lab.train(f"whole-{optim}", **parts)
        file = lab.job(f"stopped-{optim}", **parts)
        out = file.parent / "out"
        out.mkdir()
        (out / "stop").touch()
        stopped = lab.rerun(file)
        yield Check(f"{optim}_stops", stopped.code, "5", stopped.code == EXIT_STOPPED)
        (out / "stop").unlink()
        resumed = lab.rerun(file)
        yield within(f"{optim}_resumes", farthest(resumed.losses, whole.losses), 1e-3)
    if not lab.small:
        yield _killed_and_resumed(lab, clock)


def _killed_and_resumed(lab: Laboratory, clock: Clock) -> Check:
    parts = {**_curve("qlora"), "rows": chat_rows(200)}
    parts["training"] = {**parts["training"], "num_train_epochs": 2}
    whole, file = lab.train("unbroken", **parts), lab.job("killed", **parts)
    checkpoints = file.parent / "out" / "checkpoints"
    with lab.started(file) as process:
        while process.poll() is None and not list(checkpoints.glob("step-*")):
            clock.check()
            time.sleep(0.05)
        process.kill()
    return within("killed_and_resumed", farthest(lab.rerun(file).losses, whole.losses), 1e-3)


def ranks(lab: Laboratory, clock: Clock) -> Iterator[Check]:
    """Two devices, each with half of every batch, follow the curve of one. NCCL refuses one GPU twice."""
    count = torch.cuda.device_count() if lab.device == "cuda" else 0
    if count < 2:
        yield Check("devices", count, "2; for processors see tests/train/test_ranks.py")
        return
    parts = {**_curve("lora"), "micro_batch_size": 2}
    alone = lab.train("alone", **parts)
    for strategy in ("ddp", "fsdp"):
        file = lab.job(strategy, placement={"strategy": strategy, "gpus": 2}, **parts)
        argv = launcher.command(
            "worker.train",
            placement=Placement(strategy=strategy, gpus=2),
            spec_file=file,
            out=file.parent / "out",
        )
        yield within(strategy, farthest(lab.rerun_apart(file, clock=clock, argv=argv).losses, alone.losses), 1e-3)


def families(lab: Laboratory, clock: Clock) -> Iterator[Check]:
    """Each architecture trains a step, or is refused by name."""
    for name in list(FAMILIES)[:2] if lab.small else FAMILIES:
        clock.check()
        model = make_family(lab.folder / f"family-{name}", name)
        try:
            ended = lab.train(name, model=model, rows=chat_rows(4), training={"max_steps": 1, "num_train_epochs": 1})
        except Exception as error:  # noqa: BLE001 -- what a family meets is the finding
            yield Check(name, f"{type(error).__name__}: {error}"[:300], "trains or is refused by name", ok=False)
            continue
        told = "trains" if ended.code == EXIT_DONE else ended.last("failed").message[:300]
        yield Check(name, told, "trains or is refused by name", ended.code in {EXIT_DONE, EXIT_USER_FAULT})
