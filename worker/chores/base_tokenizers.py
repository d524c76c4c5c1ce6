"""Fetches a base model's tokenizer, template and configs, so that a host without its weights can read rows.

Rows are judged before a job is queued, and by preflights, on any host: of a base at the hub some megabytes are enough.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from shared.settle.catalogue import CatalogueEntry, local_folder
from shared.settle.plain_models import must_be_plain
from worker import base_models
from worker.base_models import BaseModelUnavailable, Interrupt


def ensure(
    entry: CatalogueEntry, *, cache: Path, interrupt: Interrupt, user: Path | None = None, most: int | None = None
) -> Path:
    """A folder with what the rows of a job on this base are read with. Fetched first if this host lacks it.

    A model of the hub that is not here is fetched without its weights; other sources have it in one piece.

    Raises what `base_models.ensure` raises.
    """
    whole = local_folder(entry, cache=cache)
    if entry.ref.source != "hub" or whole.is_dir():
        return base_models.ensure(entry, cache=cache, interrupt=interrupt, user=user, most=most)
    folder = base_models.beside(whole, "words")
    if base_models.hold(folder, user, interrupt):
        return folder
    with base_models.locked(base_models.beside(folder, "lock"), interrupt):
        if not folder.is_dir():
            _fetch(entry, folder, interrupt)
    if not base_models.hold(folder, user, interrupt):
        raise BaseModelUnavailable(f"{folder.name} was removed to make room for a base model.")
    return folder


def _fetch(entry: CatalogueEntry, folder: Path, interrupt: Interrupt) -> None:
    scratch = base_models.beside(folder, "fetch")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        made = base_models.from_hub(entry, scratch, interrupt, weights=False)
        must_be_plain(made, weights=False)
        made.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
