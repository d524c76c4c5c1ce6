"""Remembers rows that were read and found good, so that a job on the same rows need not have them read again.

HOME/rows-read/{KEY}, empty files. The key names all that a refusal of rows rests on, and the project: nobody learns by
a quick answer that another project has the same file. A trainer that could leave a mark here would spare itself a
refusal that it gets from the trainer all the same.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from shared.contract.spec import JobSpec
from shared.lease.values import Claim
from shared.settle.catalogue import CatalogueEntry, local_folder
from worker.host import prepared_bases
from worker.host.host import Host
from worker.host.libraries import trainer_libraries

MOST: Final = 4096
# What no row is refused for. What is not named here counts, so a new field is looked at anew.
_NOT_OF_ROWS: Final[dict[str, Any]] = {
    "adapter": True,
    "placement": True,
    "quantization": True,
    "queue": True,
    "seed": True,
    "training": {"learning_rate", "max_steps", "num_train_epochs"},
}


def mark_of(host: Host, claim: Claim, spec: JobSpec, entry: CatalogueEntry) -> Path:
    """The file that is there once these rows were read by this program for a job like this, and found good."""
    files = (claim.training_file, claim.validation_file)
    rests_on = {
        "project": claim.project_id,
        "files": [None if file is None else file.sha256 for file in files],
        "job": spec.model_dump(mode="json", exclude=_NOT_OF_ROWS),
        "base": prepared_bases.marks_of(local_folder(entry, cache=host.settings.cache)),
        "versions": {**trainer_libraries(), "tunepool-server": host.worker.version},
    }
    key = hashlib.sha256(json.dumps(rests_on, sort_keys=True).encode()).hexdigest()
    return host.settings.home.resolve() / "rows-read" / key


def remember(mark: Path) -> None:
    """Leave the mark; of too many the oldest go."""
    mark.parent.mkdir(mode=0o700, exist_ok=True)
    mark.touch()
    marks = list(mark.parent.iterdir())
    if len(marks) > MOST:
        for old in sorted(marks, key=lambda place: place.stat().st_mtime)[: len(marks) - MOST // 2]:
            old.unlink(missing_ok=True)
