"""Where a pipeline runs: commit, branch and address of the run, from the CI system's variables or from git."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CiEnvironment:
    """Empty texts are what is not known."""

    git_sha: str
    branch: str
    run_url: str
    github: bool
    step_summary: Path | None
    outputs: Path | None = None  # GitHub's, for later steps

    def group(self, pipeline: str) -> str:
        """The jobs that a newer push replaces: of this pipeline, on this branch."""
        return re.sub(r"[^A-Za-z0-9_.:/@-]", "-", f"{pipeline}:{self.branch or 'local'}")[:128]


def surroundings(folder: Path) -> CiEnvironment:
    def first(*names: str) -> str:
        return next((os.environ[name] for name in names if os.environ.get(name)), "")

    run_url = first("CI_PIPELINE_URL", "BUILD_URL")
    if os.environ.get("GITHUB_RUN_ID"):
        server, repository = first("GITHUB_SERVER_URL"), first("GITHUB_REPOSITORY")
        run_url = f"{server}/{repository}/actions/runs/{os.environ['GITHUB_RUN_ID']}"
    summary = first("GITHUB_STEP_SUMMARY")
    return CiEnvironment(
        git_sha=first("GITHUB_SHA", "CI_COMMIT_SHA", "GIT_COMMIT") or _git(folder, "rev-parse", "HEAD"),
        branch=first("GITHUB_HEAD_REF", "GITHUB_REF_NAME", "CI_COMMIT_REF_NAME", "BRANCH_NAME", "GIT_BRANCH")
        or _git(folder, "rev-parse", "--abbrev-ref", "HEAD"),
        run_url=run_url,
        github=os.environ.get("GITHUB_ACTIONS") == "true",
        step_summary=Path(summary) if summary else None,
        outputs=Path(outputs) if (outputs := first("GITHUB_OUTPUT")) else None,
    )


def _git(folder: Path, *words: str) -> str:
    """What git says of the folder; empty where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
