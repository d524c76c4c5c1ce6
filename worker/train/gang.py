"""torchrun that keeps the trainer contract: `python -m worker.train.gang [torchrun options] --module MODULE SPEC OUT`.

torchrun starts the ranks of this host, ends them all when one dies, and exits 1 whatever the reason was. Here the exit
code is that of the rank which ended first (docs/trainer.md), and SIGTERM asks all ranks, on every host, to stop. Ranks
that ran out of memory over validation rows, and wrote down that fewer will do, are started again.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Final

from worker.train import light_start

if __name__ == "__main__":
    light_start.begin()

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from shared.contract.events import EXIT_OUT_OF_MEMORY, EXIT_STOPPED, EXIT_USER_FAULT
from worker.train import evaluation_rows
from worker.train.reporting import Reporter

# A rank that says why it ends does so first; the others may fall over its absence before torchrun has looked.
_TELLING: Final = (EXIT_USER_FAULT, EXIT_OUT_OF_MEMORY, EXIT_STOPPED)


def main(arguments: list[str]) -> int:
    """Run the ranks of this host to their end; returns the exit code of the first that failed, or 0."""
    # torchrun would end the ranks on SIGTERM; they are to write a checkpoint first.
    options = parse_args(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", "--max-restarts=0", *arguments])
    out = Path(options.training_script_args[-1])
    signal.signal(signal.SIGTERM, lambda _number, _frame: (out / "stop").touch())
    known, code = evaluation_rows.read(out), _run(options)
    while code == EXIT_OUT_OF_MEMORY and (rows := evaluation_rows.read(out)) != known:
        sentence = f"Validation ran out of memory; it goes on with {rows} rows at a time on each device."
        Reporter(out / "events.jsonl", clock=time.time).say(sentence, level="warn")
        known, code = rows, _run(options)
    if code < 0:  # killed: end likewise, so that the supervisor hears which signal it was
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    return code


def _run(options: Namespace) -> int:
    try:
        run(options)
    except ChildFailedError as failed:
        codes = [failure.exitcode for failure in failed.failures.values()]
        first = failed.get_first_failure()[1].exitcode
        return next((code for code in codes if code in _TELLING), first)
    return 0


if __name__ == "__main__":
    light_start.end()
    sys.exit(main(sys.argv[1:]))
