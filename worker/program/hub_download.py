"""Brings a commit of a hub's repository here: `python -m worker.program.hub_download REPOSITORY COMMIT FOLDER`.

With `beside` behind it without the weights: tokenizer, template and configs are all that rows are read with.

Files of weights are fetched by ranges. huggingface_hub 2.4 throws a half file away when its process ends, so each of
them grows in a part beside its place, `FILE.ETAG.part`, and the next process goes on where this one broke. Bytes of a
resumed file are held against the sha256 that the hub promises. One process at a time writes there: what a fetcher left
behind when it was killed may live for a moment longer.

Exits with the status of a refusal less 360; what may pass (an outage, too many requests) is an error of its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.constants import MAX_HTTP_DOWNLOAD_SIZE
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from huggingface_hub.file_download import HfFileMetadata, http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented there

from shared.operating.secrecy import hide_secrets

WEIGHTS: Final = ("*.safetensors",)
BESIDE: Final = ("*.safetensors.index.json", "*.json", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt")
# The same weights once more, in other forms: gpt-oss, Llama and Mistral publish them so.
DUPLICATES: Final = ("original/*", "consolidated*", "metal/*")
REFUSALS: Final = (401, 403, 404)
_GATED: Final = 48  # `worker.base_models.GATED`
AT_ONCE: Final = 4  # files


def download(repository: str, commit: str, folder: Path, *, weights: bool = True) -> None:
    """Bring everything that a base model needs. Raises HfHubHTTPError, OSError and what the network raises."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "writer.lock").open("w") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)
        _download(repository, commit, folder, weights=weights)


def _download(repository: str, commit: str, folder: Path, *, weights: bool) -> None:
    others = list(DUPLICATES)
    snapshot_download(
        repository, revision=commit, local_dir=folder, allow_patterns=list(BESIDE), ignore_patterns=others
    )
    if not weights:
        return
    names = HfApi().list_repo_files(repository, revision=commit)
    published = [name for name in names if _is_any(name, WEIGHTS) and not _is_any(name, DUPLICATES)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(partial(_bring, repository, commit, folder), sorted(published)):
            pass


def _is_any(name: str, patterns: tuple[str, ...]) -> bool:
    """As huggingface_hub reads patterns."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def _bring(repository: str, commit: str, folder: Path, name: str) -> None:
    """Raises OSError for a name that leads out of the folder, as no repository has one."""
    place = folder / name
    if not place.resolve().is_relative_to(folder.resolve()):
        raise OSError(f"The hub lists a file that would lie outside the model's folder: {name[:200]!r}")
    if place.is_file():  # whole: parts have names of their own
        return
    url = hf_hub_url(repository, name, revision=commit)
    headers = build_hf_headers()
    seen = get_hf_file_metadata(url, headers=headers)
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f"{place.name}.{re.sub('[^0-9A-Za-z]', '', seen.etag or '')[:64]}.part")
    if (seen.size or 0) > MAX_HTTP_DOWNLOAD_SIZE and not part.is_file():
        hf_hub_download(repository, name, revision=commit, local_dir=folder)  # larger than a hub gives by ranges
        return
    _grow(part, seen, url=url, headers=headers)
    part.rename(place)


def _grow(part: Path, seen: HfFileMetadata, *, url: str, headers: dict[str, str]) -> None:
    """Fetch what the part lacks. Raises OSError when its bytes are not those that the hub promises."""
    if urlsplit(url).netloc != urlsplit(seen.location).netloc:  # a store of another host: no token for it
        headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
    before = part.stat().st_size if part.is_file() else 0
    if seen.size is not None and before > seen.size:
        part.unlink()
        before = 0
    with part.open("ab") as file:
        http_get(seen.location, file, resume_size=before, headers=headers, expected_size=seen.size)
    if before and re.fullmatch("[0-9a-f]{64}", seen.etag or "") and _sha256(part) != seen.etag:
        part.unlink()
        raise OSError(f"{part.name} had other bytes than the hub promises; it is fetched anew")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main(repository: str, commit: str, folder: str, which: str = "") -> None:
    hide_secrets()  # the hub's token
    try:
        download(repository, commit, Path(folder), weights=which != "beside")
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, HfHubHTTPError):
            cause = cause.__cause__
        if cause is None or cause.response.status_code not in REFUSALS:
            raise
        sys.exit(_GATED if isinstance(cause, GatedRepoError) else cause.response.status_code - 360)


if __name__ == "__main__":
    main(*sys.argv[1:])
