"""What only a GPU can show, in ten minutes: `make gpu`.

`python bench/gpu_acceptance.py [--device cpu] [--only NAME …]`: sections with a time of their own, a JSON line after
each, no network. Models have random weights of real shapes, made on the device. Exit code 0: every check holds.
`--device cpu` runs through the same sections with tiny sizes: it shows that the program works, and nothing about GPUs.
It has not been run on a GPU: none was at hand.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # started by its path, from anywhere
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from bench.acceptance import roads, sections  # noqa: E402
from bench.acceptance.laboratory import Check, Clock, Laboratory, OutOfTime  # noqa: E402
from bench.acceptance.sections import Section  # noqa: E402

# Name -> (seconds that it may take, what it does). In this order, because later ones use earlier figures.
SECTIONS: Final[dict[str, tuple[float, Section]]] = {
    "machine": (15, sections.machine),
    "devices": (20, sections.devices),
    "isolation": (40, sections.isolation),
    "methods": (90, sections.methods),
    "layers": (20, sections.layers),
    "loading": (60, sections.loading),
    "speed": (110, sections.speed),
    "roads": (130, roads.roads),
    "memory": (110, sections.memory),
    "exhaustion": (60, sections.exhaustion),
    "resuming": (45, sections.resuming),
    "ranks": (60, sections.ranks),
    "families": (40, sections.families),
}


def run_section(name: str, lab: Laboratory) -> dict[str, Any]:
    """One section as it is printed. Whatever it raises is its finding, and the next one runs."""
    seconds, section = SECTIONS[name]
    clock, checks, error = Clock(seconds), list[Check](), ""
    try:
        for check in section(lab, clock):
            checks.append(check)
    except OutOfTime as late:
        error = f"out of time {late}"
    except Exception as failed:  # noqa: BLE001 -- the sections after it still have something to show
        traceback.print_exc()
        error = f"{type(failed).__name__}: {failed}"[:500]
        lab.forget()
    return {
        "section": name,
        "ok": not error and all(check.ok is not False for check in checks),
        "seconds": round(time.monotonic() - clock.began, 1),
        **({"error": error} if error else {}),
        "checks": [asdict(check) for check in checks],
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", choices=list(SECTIONS), nargs="+", default=list(SECTIONS))
    wanted = parser.parse_args(arguments)
    if wanted.device == "cuda" and not torch.cuda.is_available():
        print(json.dumps({"ok": False, "error": "PyTorch sees no GPU here; try: tunepool-server doctor"}))
        return 2
    warnings.filterwarnings("ignore")
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="tunepool-acceptance-") as folder:
        lab = Laboratory(wanted.device, Path(folder))
        results = []
        for name in wanted.only:
            results.append(run_section(name, lab))
            print(json.dumps(results[-1], default=str), flush=True)
    failed = [result["section"] for result in results if not result["ok"]]
    print(json.dumps({"ok": not failed, "device": wanted.device, "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
