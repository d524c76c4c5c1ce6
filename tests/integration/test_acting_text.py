"""What one person writes and others read is refused when it would act on a terminal or turn a line around."""

from __future__ import annotations

from typing import Any

import pytest

from shared.store.db import session_scope
from tests.factories import make_file, make_key
from tests.integration.conftest import Api
from tests.integration.test_bad_requests import refused

ACTING = ["\x1b[2J", "\x07", "\n", "\x7f", "\x9b2J", "\x85", "\u202a", "\u202e", "\u2066", "\u2069"]
JOB = {"model": "smollm2-135m-instruct"}


@pytest.mark.parametrize("text", ACTING, ids=ascii)
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("projects", {"name": "a{}b"}, "name"),
        ("keys", {"name": "a{}b", "project_id": "proj_x"}, "name"),
        ("jobs/cancel", {"metadata": {"team": "{}"}}, "metadata.team"),
        ("devices/x/quarantine", {"reason": "{}"}, "reason"),
        ("/fine_tuning/jobs", {**JOB, "metadata": {"team": "a{}"}}, "metadata.team"),
        ("/fine_tuning/jobs", {**JOB, "metadata": {"te{}am": "a"}}, "metadata."),
        ("/fine_tuning/jobs", {**JOB, "suffix": "a{}b"}, "suffix"),
        (
            "/fine_tuning/jobs",
            {**JOB, "integrations": [{"type": "wandb", "wandb": {"project": "{}"}}]},
            "integrations.",
        ),
        ("preflights", {**JOB, "metadata": {"team": "a{}"}}, "metadata.team"),
    ],
)
def test_a_name_or_label_that_would_act_on_a_terminal_is_refused(
    api: Api, path: str, body: dict[str, Any], param: str, text: str
) -> None:
    with session_scope(api.engine) as session:
        _, key = make_key(session, scopes=("*", "admin"))
        body = {**filled(body, text), **({"training_file": "file-x"} if "model" in body else {})}
    with api.http(key) as http:
        answer = http.post(f"/v1{path}" if path.startswith("/") else f"/v1/tunepool/{path}", json=body)

    error = refused(api, answer)
    assert (error["param"] or "").startswith(param)
    assert error["message"].isprintable()


def filled(value: Any, text: str) -> Any:
    """The value with `{}` replaced wherever it stands."""
    if isinstance(value, dict):
        return {name.replace("{}", text): filled(one, text) for name, one in value.items()}
    if isinstance(value, list):
        return [filled(one, text) for one in value]
    return value.replace("{}", text)


def test_ordinary_text_of_every_script_and_a_template_with_lines_and_tabs_is_taken(api: Api) -> None:
    with session_scope(api.engine) as session:
        file_id = make_file(session, api.caller).id
    template = "{% for m in messages %}\n\t{{ m.content }}\n{% endfor %}"
    body = {
        **JOB,
        "training_file": file_id,
        "metadata": {"équipe": "größe 字 שלום 👩\u200d🔬"},
        "tunepool": {"training": {"chat_template": template}},
    }
    with api.http() as http:
        assert http.post("/v1/fine_tuning/jobs", json=body).json()["metadata"] == body["metadata"]
