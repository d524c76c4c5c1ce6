"""What the pages tell people to type is there: commands with their options, targets of make, variables.

A page is read as its readers do: lines of its blocks that begin with a command, and commands between backticks.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from tunepool.main import cli

from standalone.main import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "cli/README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = {"tunepool": typer.main.get_command(cli), "tunepool-server": typer.main.get_command(app)}
# What may stand before a command: a container, variables, the folder of the programs.
BEFORE = r"(?:docker compose exec (?:-T )?\w+ |sudo |(?:[A-Z_]+=\S* )+|\.venv/bin/)?"
TYPED = re.compile(rf"^\s*(?:\$ )?{BEFORE}(tunepool(?:-server)? .*)$", re.MULTILINE)
INLINE = re.compile(rf"`{BEFORE}(tunepool(?:-server)? [^`]+)`")
# Where a command ends, and where a page leaves something open.
ENDS = re.compile(r"\s(?:[|&;>/]|>>|2>|&&|\|\|)(?:\s|$)|\s{3,}|\$\(|…|\.\.\.")


# What a line of a shell block may begin with: programs, the shell's own words, a variable.
PROGRAMS = {
    ".",
    "cp",
    "curl",
    "docker",
    "export",
    "git",
    "helm",
    "hf",
    "install",
    "kubectl",
    "llama-server",
    "make",
    "ollama",
    "pip",
    "psql",
    "python",
    "python3",
    "sudo",
    "systemctl",
    "tunepool",
    "tunepool-server",
    "useradd",
}


def blocks(text: str) -> str:
    return "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


def typed(page: Path) -> Iterator[str]:
    """Each command of a page, without what follows it on its line."""
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for line in [*TYPED.findall(blocks(text).replace("\\\n", " ")), *INLINE.findall(prose)]:
        yield ENDS.split(line, maxsplit=1)[0].strip()


def wrong(line: str) -> str:
    """What is not there of a command; empty when all of it is."""
    try:
        program, *words = shlex.split(line, comments=True)
    except ValueError:  # a quotation that goes on behind what the page leaves open
        program, *words = line.split()
    command: Any = COMMANDS[program]
    options = {option for known in command.params for option in known.opts + known.secondary_opts}
    for word in words:
        if word.startswith("-"):
            name = word.partition("=")[0].strip("[]")
            if name not in options | {"--help"}:
                return f"{command.name} has no option {name}"
        elif hasattr(command, "commands") and re.fullmatch(r"[a-z][a-z-]*", word):
            inner = command.commands.get(word)
            if inner is None:
                return f"{command.name} has no command {word}"
            command = inner
            options |= {option for known in command.params for option in known.opts + known.secondary_opts}
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_is_there_with_its_options(page: Path) -> None:
    problems = [f"{line}: {problem}" for line in typed(page) if (problem := wrong(line))]

    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_line_of_a_shell_block_begins_with_a_command(page: Path) -> None:
    """A block whose lines were joined and broken anew, as text is, cannot be typed."""
    shell = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in shell for line in block.replace("\\\n", " ").splitlines()]
    starts = [line for line in lines if line.strip() and not line.startswith((" ", "#"))]

    assert not [line for line in starts if line.split()[0] not in PROGRAMS and not re.match(r"[A-Z_]+=", line)]


def test_the_pages_of_the_first_hour_have_commands_to_type() -> None:
    """The scan sees them: a page that changes its form is noticed."""
    counts = {page.stem: len(list(typed(page))) for page in PAGES}

    assert counts["gpu-hosts"] > 10
    assert counts["models"] > 10


@pytest.mark.parametrize(
    "line",
    [
        "tunepool models fetch-all",
        "tunepool models add meta-llama/X --wait-for-it",
        "tunepool-server keys invent",
        "tunepool --jsonl models list",
    ],
)
def test_the_scan_sees_what_is_not_there(line: str) -> None:
    assert wrong(line)


def test_every_target_of_make_that_a_page_names_is_there() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {
        (page.name, target)
        for page in PAGES
        for text in [page.read_text(encoding="utf-8")]
        for target in re.findall(r"(?:^|`|&& )make ([a-z][a-z-]*)", text, re.MULTILINE)
    }

    assert {target for _, target in named} >= {"setup", "demo", "test", "env", "gpu"}
    assert not sorted(pair for pair in named if pair[1] not in targets)
