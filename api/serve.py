"""The API's process, and the parent of its processes when there are several: `python -m api.serve OPTIONS`.

The options are uvicorn's. Its own command would leave the parent's environment to be read, credentials and all.
"""

from __future__ import annotations

import gc

if __name__ == "__main__":
    # What imports make lives to the end: to look through it meanwhile is a quarter of the start. The application has it
    # on again.
    gc.disable()

from uvicorn.main import main as uvicorn

from shared.operating.secrecy import hide_secrets


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    hide_secrets()
    uvicorn(prog_name="api.serve")


if __name__ == "__main__":
    main()
