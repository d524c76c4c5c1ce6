"""Obeys the contract of the programs that make products, without torch: `python -m tests.fake_merger SPEC OUT`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from shared.contract.merge_request import MergeSpec


def main(spec_file: Path, out: Path) -> int:
    """Makes one file of the adapters' own files; a folder `slow` beside the base model makes it take its time."""
    spec = MergeSpec.model_validate_json(spec_file.read_bytes())
    if (Path(spec.base_model_path).parent / "slow").exists():
        time.sleep(600)
    unfinished = out / "product.tmp"
    unfinished.mkdir()
    chains = [json.loads((Path(path) / "chain.json").read_text())["chain"] for path in spec.adapter_paths]
    (unfinished / "model.json").write_text(json.dumps({"chains": chains, "name": spec.name}))
    unfinished.rename(out / "product")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
