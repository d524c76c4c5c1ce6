"""torchrun that keeps the trainer contract: `python -m worker.train.gang [torchrun options] --module MODULE SPEC OUT`.

torchrun starts the ranks of this host, ends them all when one dies, and exits 1 whatever the reason was. Here the exit
code is that of the rank which ended first (docs/trainer.md), and SIGTERM asks all ranks, on every host, to stop.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main(arguments: list[str]) -> int:
    """Run the ranks of this host to their end; returns the exit code of the first that failed, or 0."""
    # torchrun would end the ranks on SIGTERM; they are to write a checkpoint first.
    options = parse_args(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", "--max-restarts=0", *arguments])
    out = Path(options.training_script_args[-1])
    signal.signal(signal.SIGTERM, lambda _number, _frame: (out / "stop").touch())
    try:
        run(options)
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
        if code < 0:  # killed: end likewise, so that the supervisor hears which signal it was
            signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
            os.kill(os.getpid(), -code)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
