"""Brings a folder into a repository of a hub by its library: `python -m worker.chores.hub_program`.

One JSON object comes on standard input and one goes to standard output: `{"url", "commit"}`, `{"refused": STATUS}` for
what no second try mends, or `{"error": words}`. A push that was interrupted begins anew; files that the hub has are not
sent again.
"""

from __future__ import annotations

from typing import Any, Final

from httpx2 import HTTPError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from worker.chores.library_answer import answer_once

REFUSALS: Final = (400, 401, 403, 404, 409)


def push(wanted: dict[str, Any]) -> dict[str, Any]:
    """Make the repository if it is not there, and commit the folder. Raises HfHubHTTPError, OSError, RuntimeError."""
    hub = HfApi(endpoint=wanted["endpoint"], token=wanted["token"])
    hub.create_repo(wanted["repository"], private=wanted["private"], exist_ok=True)
    made = hub.upload_folder(
        repo_id=wanted["repository"], folder_path=wanted["folder"], commit_message=wanted["message"]
    )
    return {"url": f"{wanted['endpoint']}/{wanted['repository']}", "commit": made.oid}


def answered(wanted: dict[str, Any]) -> dict[str, Any]:
    """The answer of a push, also where it failed."""
    try:
        return push(wanted)
    except (HfHubHTTPError, HTTPError, OSError, RuntimeError, ValueError) as error:
        return _words(error)


def _words(error: Exception) -> dict[str, Any]:
    """The library's threads wrap what went wrong."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    if cause is not None and cause.response.status_code in REFUSALS:
        return {"refused": cause.response.status_code}
    return {"error": f"The hub did not take it: {type(cause or error).__name__}."}


if __name__ == "__main__":
    answer_once(answered)
