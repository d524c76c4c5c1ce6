"""The frame of all programs that make a product without training: how they start, report and end."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from shared.contract.events import EXIT_DONE, EXIT_OUT_OF_MEMORY, EXIT_USER_FAULT, Failed
from shared.contract.merge_request import MergeSpec
from shared.errors import TunepoolError
from worker.train.memory import limit_host_memory, out_of_memory_code, peak_host_memory_bytes
from worker.train.reporting import Reporter


def make_product(write: Callable[[MergeSpec, Path], None], *, spec_file: Path, out: Path) -> int:
    """Have `write` fill a folder that is `OUT/product` once it is complete. Returns an exit code of the trainer's."""
    out.mkdir(parents=True, exist_ok=True)
    reporter = Reporter(out / "events.jsonl", clock=time.time)
    unfinished = out / "product.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        spec = MergeSpec.model_validate_json(spec_file.read_bytes())
        torch.set_num_threads(spec.cpu_threads)
        if spec.memory_limit_bytes is not None:
            weights = Path(spec.base_model_path).glob("*.safetensors")
            limit_host_memory(spec.memory_limit_bytes, mapped=sum(file.stat().st_size for file in weights))
        write(spec, unfinished)
    except TunepoolError as error:
        reporter.write(Failed, code=error.code, message=error.message, param=error.param)
        return EXIT_USER_FAULT
    except (MemoryError, RuntimeError) as error:
        code = out_of_memory_code(error)
        if code is None:
            raise
        message = str(error).splitlines()[0] if str(error) else "out of memory"
        reporter.write(Failed, code=code, message=message, peak_memory_bytes=peak_host_memory_bytes())
        return EXIT_OUT_OF_MEMORY
    unfinished.rename(out / "product")
    return EXIT_DONE
