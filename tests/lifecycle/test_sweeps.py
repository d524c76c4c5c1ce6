"""A sweep from its file to an alias: `tunepool sweep` against a whole stack whose janitor is killed amid a round."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from api.app import create_app
from shared.products import aliases
from shared.store.db import session_scope
from shared.store.tables import JobRow
from shared.tenants import keys, signing_keys
from tests.lifecycle.stack import Servers, open_stack
from tests.lifecycle.test_pipeline import GATE, ITEMS, SETTINGS, TOOL, Counted, Site
from tests.live import served
from tests.patience import paced, patience

RATES = "tunepool.training.learning_rate"
SWEEP = f"""\
name: rates
training: train.jsonl
validation: valid.jsonl
model: tiny
preflight: false
evaluate:
  items: {{file: heldout.jsonl}}
  measures: [{{type: exact_match, name: exact_match}}]
gate: gate.yaml
promote: rates@prod
sweep:
  parameters:
    {RATES}: [1e-2, 1e-5, 1e-3, 1e-4]
  strategy: {{type: halving, factor: 2, first_step: 4}}
  max_parallel: 2
"""


def write_files(folder: Path) -> None:
    """The fake trainer's loss is the lowest for 1e-3; its product answers two of the items wrongly."""
    behaviour = paced("looks steps=60 step_seconds=0.1 save=10 wrong=2")
    rows = [json.dumps({"text": f"fake: {behaviour}"}), *(json.dumps({"text": f"row {n}"}) for n in range(11))]
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "valid.jsonl").write_text("".join(json.dumps({"text": f"valid {n}"}) + "\n" for n in range(12)))
    chats = [{"messages": [{"role": role, "content": f"{n}"} for role in ("user", "assistant")]} for n in range(ITEMS)]
    (folder / "heldout.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "sweep.yaml").write_text(SWEEP)
    (folder / "gate.yaml").write_text(GATE)


def run(site: Site, folder: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    """(exit code, the document, all of stdout and stderr)."""
    done = subprocess.run(
        [TOOL, "--json", "sweep", "sweep.yaml", *words],
        cwd=folder,
        env=site.environment(),
        capture_output=True,
        text=True,
        timeout=patience(240),
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


def test_a_sweep_outlives_its_janitor_and_its_client_stops_losers_and_promotes_the_best(
    servers: Servers, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_files(folder)
    with open_stack(tmp_path / "stack", servers, **SETTINGS) as stack:
        with session_scope(stack.engine) as session:
            signing_keys.ensure(session, stack.settings)
            _, key = keys.create(session, project_id=stack.caller.project_id, name="runner")
        api = Counted(create_app(stack.settings))
        with served(api) as url:
            site = Site(stack, api, url, key)
            code, asked, words = run(site, folder)  # this client goes home
            assert code == 0, words
            edge = "sweep_before_commit:exit:once"
            deadly = stack.start(["-m", "worker.janitor"], name="deadly", TUNEPOOL_FAILPOINT=edge)
            assert deadly.wait(patience(30)) != 0
            stack.start_worker()
            stack.start_janitor()

            summary, picture = folder / "summary.md", folder / "sweep.svg"
            code, told, words = run(site, folder, "--wait", "--summary", str(summary), "--picture", str(picture))

        sweep = told["sweep"]
        assert (code, told["status"], sweep["id"], sweep["best"]) == (0, "passed", asked["id"], 2), words
        assert [trial["state"] for trial in sweep["trials"]] == ["stopped", "stopped", "succeeded", "stopped"]
        assert sweep["trials"][1]["reason"].startswith("rank 4 of 4 at step 4 (valid_loss 2.25)")
        assert sweep["trials"][0]["reason"].startswith("rank 2 of 2 at step 8 (valid_loss 1.125)")
        assert [step["name"] for step in told["steps"]] == ["sweep", "evaluate", "gate", "promote"]
        with Session(stack.engine) as session:
            jobs = session.scalars(select(JobRow.id).where(JobRow.group_name == sweep["id"])).all()
            alias = aliases.find(session, "rates@prod", project_id=stack.caller.project_id)
            assert aliases.version(session, alias, alias.version).model == sweep["trials"][2]["model"]
        assert sorted(jobs) == sorted(trial["job"] for trial in sweep["trials"])
        said = [event.message for job in jobs for event in stack.events(job)]  # whichever came to its rung first
        assert any("waits there for the other trials" in message for message in said)
        assert "| 2 * | learning_rate=0.001 | succeeded |" in summary.read_text()
        assert picture.read_bytes().count(b"<polyline") == 4
        assert stack.broken_invariants() == []
