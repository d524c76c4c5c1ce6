"""What a worker knows of a run, and how the signed statement about it is stored beside the adapter.

The sums of published files are all that is read here from what the trainer wrote.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from shared.contract.documents import ManifestEntry
from shared.contract.events import Finished
from shared.jobs import provenance
from shared.jobs.provenance import RunFacts
from shared.lease.values import Claim, NewFile
from shared.store.storage import Store
from shared.tenants.signing_keys import SigningKey
from worker.attempt.attempt_folder import AttemptFolder
from worker.host.libraries import trainer_libraries
from worker.program import workdir
from worker.program.workdir import Interrupt

_TOKENIZER_FILES: Final = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"),
    *("merges.txt", "chat_template.jinja", "config.json"),
)
_INSTALLATION: Final = "urn:tunepool:installation"


def facts(
    place: AttemptFolder, claim: Claim, *, files: tuple[ManifestEntry, ...], result: NewFile, finished: Finished
) -> RunFacts:
    return RunFacts(
        files=files,
        result=result,
        finished=finished,
        devices=(place.device.name,) * len(claim.device_ids),
        device_kind=place.kind,
        libraries=trainer_libraries(),
        base_files=dict(_sums(place.model)),
        micro_batch_size=place.micro_batch_size,
        gradient_checkpointing=place.gradient_checkpointing,
        recomputed_layers=place.recomputed_layers,
        builder=place.host.settings.public_url or _INSTALLATION,
    )


def put(
    store: Store, key: SigningKey, stated: dict[str, Any], *, prefix: str, scratch: Path, interrupt: Interrupt
) -> ManifestEntry:
    """Sign a statement and upload the envelope below `prefix`; returns its line of the manifest. Raises Unavailable."""
    envelope = key.envelope(provenance.payload(stated), payload_type=provenance.PAYLOAD_TYPE)
    name = provenance.FILE_NAME
    size, sha256 = workdir.publish_text(
        store, f"{prefix}/{name}", json.dumps(envelope) + "\n", scratch=scratch, interrupt=interrupt
    )
    return ManifestEntry(name=name, bytes=size, sha256=sha256)


def _sums(model: Path) -> Iterator[tuple[str, str]]:
    for name in _TOKENIZER_FILES:
        file = model / name
        if file.is_file():
            with file.open("rb") as stream:
                yield name, hashlib.file_digest(stream, "sha256").hexdigest()
