"""What browsers fetch beside the pages: our own files, and the npm packages' that `standalone.page_parts` brings.

All are read when the process starts. Their addresses name their contents, so that a browser keeps them for ever.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fastapi import APIRouter, Request, Response

from shared.errors import NotFound

PLACE: Final = Path(__file__).parent
# Names of the parts that live pages need. Their licences lie beside them.
PARTS: Final = ("htmx.js", "hx-sse.js", "uplot.js", "uplot.css")
_KINDS: Final = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}

router = APIRouter(prefix="/ui/files-of-the-page")


@dataclass(frozen=True)
class PageFile:
    """A file as it is sent."""

    kind: str
    content: bytes
    digest: str = field(init=False)
    packed: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", hashlib.sha256(self.content).hexdigest()[:16])
        object.__setattr__(self, "packed", gzip.compress(self.content, mtime=0))


def page_files(*folders: Path) -> dict[str, PageFile]:
    """Every file of these folders that browsers may fetch, by name."""
    paths = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())]
    return {path.name: PageFile(_KINDS[path.suffix], path.read_bytes()) for path in paths if path.suffix in _KINDS}


FILES: Final[Mapping[str, PageFile]] = page_files(PLACE / "static", PLACE / "parts")
MISSING: Final = tuple(name for name in PARTS if name not in FILES)


def address(name: str) -> str:
    """Where a page finds the file. Empty: it is not there."""
    file = FILES.get(name)
    return "" if file is None else f"{router.prefix}/{name}?v={file.digest}"


@router.get("/{name}", include_in_schema=False)
async def page_file(name: str, request: Request) -> Response:
    """One of the files; whoever may see the sign-in may see these."""
    file = FILES.get(name)
    if file is None:
        raise NotFound(f"The page has no file '{name[:100]}'.")
    packs = "gzip" in request.headers.get("accept-encoding", "")
    headers = {"Cache-Control": "public, max-age=31536000, immutable", "Vary": "Accept-Encoding"}
    if packs:
        headers["Content-Encoding"] = "gzip"
    return Response(file.packed if packs else file.content, media_type=file.kind, headers=headers)
