"""Plays the runners of CI systems for the files of `examples/ci`: their variables, their shells and their steps.

The command line is installed as a job installs it: by pip, from a wheel, in an environment that has its libraries.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sysconfig
import venv
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from tests.patience import patience

ROOT: Final = Path(__file__).parents[1]
EXAMPLES: Final = ROOT / "examples/ci"
# As each system's own documentation says it starts them.
GITHUB: Final = ("bash", "-e")
GITHUB_BASH: Final = ("bash", "--noprofile", "--norc", "-eo", "pipefail")
GITLAB: Final = ("bash", "-eo", "pipefail")
JENKINS: Final = ("sh", "-xe")
# Done by the system itself: the checkout, Python, and keeping a file. A test does or looks at what they would.
ACTIONS: Final = frozenset({"actions/checkout@v4", "actions/setup-python@v5", "actions/upload-artifact@v4"})
_RECORD: Final = {
    "METADATA": "Metadata-Version: 2.1\nName: tunepool\nVersion: 0.0.1\n",
    "WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "entry_points.txt": "[console_scripts]\ntunepool = tunepool.main:app\n",
}


@dataclass(frozen=True)
class Image:
    """What a job finds on its machine: Python with pip, and a wheel of the command line somewhere."""

    programs: Path
    libraries: Path
    wheel: Path

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        known = {"PATH": f"{self.programs}:/usr/local/bin:/usr/bin:/bin", "HOME": str(home), "TMPDIR": str(home)}
        installing = {"PYTHONPATH": str(self.libraries), "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        return {**known, **installing, **more}


def make_image(place: Path) -> Image:
    """An environment without the command line, whose libraries are those of this one."""
    libraries = place / "libraries"
    libraries.mkdir(parents=True)
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.lower().startswith(("tunepool", "__editable__", "pip", "__pycache__")):
            (libraries / entry.name).symlink_to(entry)
    venv.create(place / "python", with_pip=True, symlinks=True)
    return Image(place / "python" / "bin", libraries, make_wheel(place))


def make_wheel(place: Path) -> Path:
    """A wheel of `cli/` without the tool that builds one, which comes from the network."""
    file = place / "tunepool-0.0.1-py3-none-any.whl"
    sources = sorted(path for path in (ROOT / "cli/src/tunepool").rglob("*") if path.is_file())
    with zipfile.ZipFile(file, "w") as wheel:
        for path in sources:
            if path.suffix != ".pyc":
                wheel.writestr(str(path.relative_to(ROOT / "cli/src")), path.read_bytes())
        for name, text in _RECORD.items():
            wheel.writestr(f"tunepool-0.0.1.dist-info/{name}", text)
        wheel.writestr("tunepool-0.0.1.dist-info/RECORD", "".join(f"{name},,\n" for name in wheel.namelist()))
    return file


@dataclass(frozen=True)
class Ran:
    """How a job ended: the code of the step that ended it, and all that its steps have said."""

    code: int
    words: str


@dataclass(frozen=True)
class Checkout:
    """A work tree on a runner, and the variables of its job."""

    folder: Path
    environment: Mapping[str, str]

    def run(self, steps: Iterator[tuple[tuple[str, ...], str, dict[str, str]]]) -> Ran:
        """Steps of (shell, script, variables of its own), up to the first that fails."""
        words = ""
        for shell, script, own in steps:
            done = subprocess.run(
                [*shell, "-c", script],
                cwd=self.folder,
                env={**self.environment, **own},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=patience(180),
                check=False,
            )
            words += done.stdout
            if done.returncode:
                return Ran(done.returncode, words)
        return Ran(0, words)


def read(file: str) -> Any:
    return yaml.safe_load((EXAMPLES / file).read_text(encoding="utf-8"))


def filled(text: str, values: Mapping[str, str]) -> str:
    """`${{ vars.NAME }}` and `${{ inputs.NAME }}`. Raises KeyError for one that nobody sets."""
    return re.sub(r"\$\{\{ *([a-z]+\.\w+) *\}\}", lambda match: values[match[1]], text)


def of_workflow(values: Mapping[str, str]) -> Iterator[tuple[tuple[str, ...], str, dict[str, str]]]:
    """The steps of the one job of GitHub's example."""
    (job,) = read(".github/workflows/train.yml")["jobs"].values()
    shared = {name: filled(text, values) for name, text in job["env"].items()}
    for step in job["steps"]:
        if "uses" in step:
            assert step["uses"] in ACTIONS, "a step that nobody plays"
        else:
            yield GITHUB, filled(step["run"], values), shared


def of_action(given: Mapping[str, str]) -> Iterator[tuple[tuple[str, ...], str, dict[str, str]]]:
    """The steps of the reusable action, with its inputs as `with` gives them."""
    action = read(".github/actions/tunepool/action.yml")
    assert set(given) <= set(action["inputs"])
    inputs = {
        f"inputs.{name}": given[name] if about.get("required") else given.get(name, about["default"])
        for name, about in action["inputs"].items()
    }
    for step in action["runs"]["steps"]:
        assert step["shell"] == "bash"
        own = {name: filled(text, inputs) for name, text in step.get("env", {}).items()}
        yield GITHUB_BASH, filled(step["run"], inputs), own


def of_gitlab(values: Mapping[str, str]) -> Iterator[tuple[tuple[str, ...], str, dict[str, str]]]:
    """The script of GitLab's example: one shell takes all its lines."""
    job = read(".gitlab-ci.yml")["train"]
    own = {name: values[text.removeprefix("$")] for name, text in job["variables"].items()}
    yield GITLAB, "\n".join(job["script"]), own


def of_jenkins(values: Mapping[str, str]) -> Iterator[tuple[tuple[str, ...], str, dict[str, str]]]:
    """The `sh` steps of the example for Jenkins. `credentials(NAME)` is a value of that name."""
    text = (EXAMPLES / "Jenkinsfile").read_text(encoding="utf-8")
    (block,) = re.findall(r"environment \{(.*?)\n  \}", text, flags=re.DOTALL)
    own = {}
    for name, wanted in re.findall(r"(\w+) = (.+)", block):
        match = re.fullmatch(r"\"\$\{env\.(\w+)\}\"|credentials\('([\w-]+)'\)", wanted)
        assert match, f"an expression that nobody plays: {wanted}"
        own[name] = values[match[1] or match[2]]
    scripts = re.findall(r"^\s*sh '(.*?)'(?: //.*)?$", text, flags=re.MULTILINE)
    assert len(scripts) == 2
    for script in scripts:
        yield JENKINS, script, own


def git(folder: Path, *words: str) -> str:
    """What git prints; it knows an author and nothing of whoever runs the tests."""
    who = {"GIT_AUTHOR_NAME": "ci", "GIT_AUTHOR_EMAIL": "ci@example.com"}
    who |= {"GIT_COMMITTER_NAME": "ci", "GIT_COMMITTER_EMAIL": "ci@example.com", "GIT_CONFIG_GLOBAL": os.devnull}
    known = {"PATH": os.environ["PATH"], "HOME": str(folder), **who}
    done = subprocess.run(["git", *words], cwd=folder, env=known, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"git {shlex.join(words)}: {done.stderr}"
    return done.stdout.strip()
