"""The laws of the house, read from the source. docs/architecture.md says why each one stands."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

from shared.contract import spec
from shared.contract.passes import device_kind
from shared.contract.spec import MethodName, ObjectiveName
from shared.plan import preemption
from shared.store.lifecycle import JOB_STATUSES, TERMINAL
from tests.moves import listed
from tests.patience import patience

ROOT = Path(__file__).parents[2]
PACKAGES = ("api", "worker", "shared", "standalone")
SOURCE = (*PACKAGES, "cli", "migrations")
TRAINING_STACK = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets")
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "base", "manager"}


@cache
def files(*folders: str) -> tuple[Path, ...]:
    return tuple(
        path
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "__pycache__" not in path.parts and not path.is_symlink()  # of a module that stands elsewhere
    )


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """Every node of a file: a dozen laws look at all of them."""
    return tuple(ast.walk(tree(path)))


def dotted(node: ast.AST) -> str:
    """`a.b.c` as it is written; empty for what is more than names. To write a node as text takes ten times as long."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join(reversed([*names, node.id])) if isinstance(node, ast.Name) else ""


def at(path: Path, node: ast.expr | ast.stmt | ast.excepthandler) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in nodes(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def imports(node: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    return [child for child in ast.walk(node) if isinstance(child, ast.Import | ast.ImportFrom)]


# ---- who may import whom


def test_every_import_contract_holds() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=patience(120),
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    kept = re.search(r"Contracts: (\d+) kept, 0 broken", done.stdout)
    assert kept is not None, done.stdout
    assert int(kept[1]) >= 9


def test_the_trainer_knows_nothing_of_ours_but_the_contract_and_errors() -> None:
    stray = [
        f"{at(path, node)}: {name}"
        for path in files("worker/train")
        for node in imports(tree(path))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        if name.split(".")[0] in PACKAGES
        and not name.startswith(("worker.train", "shared.contract."))
        and name != "shared.errors"
    ]

    assert stray == []


@pytest.mark.slow
@pytest.mark.parametrize("module", ["api.app", "standalone.main", "shared.jobs"])
def test_a_process_that_serves_requests_never_loads_the_training_stack(module: str) -> None:
    program = f"import sys, {module}; print(*sorted(set(sys.modules) & set({TRAINING_STACK!r})))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=patience(60), check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_every_program_that_loads_the_stack_leaves_out_what_it_does_not_need_meanwhile() -> None:
    programs = {path.stem: path.read_text() for path in (ROOT / "worker/train").glob("*.py")}
    loading = {
        name: text
        for name, text in programs.items()
        if 'if __name__ == "__main__":' in text and re.search(r"^(import|from) (torch|transformers)\b", text, re.M)
    }
    assert len(loading) >= 9
    for name, text in loading.items():
        before, _, after = text.partition("    light_start.begin()\n")
        before = before.replace("from worker.train import light_start\n", "")
        assert not re.search(r"^(import|from) (torch|transformers|peft|trl|worker)\b", before, re.M), name
        assert "    light_start.end()\n" in after, name


def test_every_process_of_a_stack_lets_the_collector_rest_while_it_imports() -> None:
    started = re.compile(r'if __name__ == "__main__":\n(?:    .*\n)*    gc\.disable\(\)\n')
    on_again = re.compile(r'if __name__ == "__main__":\n    gc\.freeze\(\)\n    gc\.enable\(\)\n')
    for name in (
        "janitor",
        "pull",
        "base_models",
        "chores/playground_queue",
        "attempt/dispatcher",
        "attempt/handed_over",
    ):
        text = (ROOT / f"worker/{name}.py").read_text()
        assert started.search(text), name
        assert on_again.search(text), name
    for first, name in (("worker/app.py", "worker/app.py"), ("api/serve.py", "api/app.py")):
        before = (ROOT / first).read_text().partition("    gc.disable()\n")[0]
        assert not re.search(r"^(import|from) (structlog|celery|uvicorn|fastapi|shared)\b", before, re.M), first
        assert re.search(r"    gc\.freeze\(\).*\n    gc\.enable\(\)", (ROOT / name).read_text()), name


def test_to_a_program_of_the_stack_the_libraries_that_it_does_not_use_are_not_installed() -> None:
    code = "from importlib.util import find_spec; from worker.train import light_start; light_start.begin(); "
    code += "print(any(find_spec(name) for name in light_start.UNUSED), bool(find_spec('trl')), end='')"

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout == "False True"


def test_no_route_stands_on_another_route() -> None:
    stray = [
        f"{at(path, node)}: {node.module}"
        for path in files("api/routes")
        for node in imports(tree(path))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("api.routes")
    ]

    assert not stray, f"{stray}: what two routes share stands beside them, in api/"


def test_modules_of_the_house_do_not_import_each_other_in_circles() -> None:
    graph = {name: _imported(path) for name, path in _modules().items()}
    waiting = dict(graph)
    while free := [name for name, needs in waiting.items() if not needs & (waiting.keys() - {name})]:
        for name in free:
            del waiting[name]

    assert not waiting, f"these modules stand in a circle, or above one: {sorted(waiting)}"


@cache
def _modules() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in files(*PACKAGES):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imported(path: Path) -> set[str]:
    """Names of the house's modules that this file imports when it is run (not those for type checkers)."""
    known, named = _modules().keys(), set[str]()
    for node in imports(tree(path)):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif node.module is not None:
            named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return named & known


def test_one_function_says_what_torch_calls_a_device() -> None:
    """Written a second time, one of them calls an AMD GPU a CPU."""
    conversions = [
        str(path.relative_to(ROOT))
        for path in files(*PACKAGES)
        for node in nodes(path)
        if isinstance(node, ast.IfExp)
        and {leaf.value for leaf in (node.body, node.orelse) if isinstance(leaf, ast.Constant)} == {"cuda", "cpu"}
    ]

    assert conversions == ["shared/contract/passes.py"]
    assert [device_kind(kind) for kind in ("cuda", "rocm", "cpu")] == ["cuda", "cuda", "cpu"]


def test_one_module_makes_turns_of_transactions() -> None:
    """Written a second time, the two could hash one name to two locks. A migration has a lock of its own."""
    locking = [
        str(path.relative_to(ROOT))
        for path in files(*PACKAGES)
        if any(isinstance(node, ast.Attribute) and node.attr.endswith("advisory_xact_lock") for node in nodes(path))
    ]

    assert locking == ["shared/store/locks.py"]


def test_no_door_judges_a_request_that_a_verb_accepts() -> None:
    """A second door would forget it: the verbs that store a request call the gate themselves."""
    judging = [
        str(path.relative_to(ROOT))
        for path in files("api", "worker", "standalone")
        for node in nodes(path)
        if isinstance(node, ast.Attribute | ast.Name) and getattr(node, "attr", "") == "check_request"
    ]

    assert judging == []


def test_the_plan_stands_on_nothing_and_its_tiers_are_the_requests_all_the_same() -> None:
    assert get_args(preemption.Tier) == get_args(spec.Tier)


# ---- names and places


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert [path for path in files(*SOURCE, "tests", "examples", "bench") if path.stem in BANNED_NAMES] == []


# docs/architecture.md says what each is about. A new name at the top of these two is a decision, not a habit.
TOP = {
    "shared": {
        *("errors", "failpoints", "ids", "log", "setting_groups", "settings"),
        *("chores", "contract", "fleet", "jobs", "lease", "operating", "plan", "products", "rows", "settle", "store"),
        "tenants",
    },
    "worker": {
        *("app", "base_models", "janitor", "pull", "pulse", "ring", "tasks"),
        *("attempt", "chores", "host", "program", "train"),
    },
}


@pytest.mark.parametrize("package", TOP)
def test_the_top_of_a_package_is_a_closed_list_of_subjects(package: str) -> None:
    tops = {path.relative_to(ROOT / package).parts[0].removesuffix(".py") for path in files(package)}

    assert tops - {"__init__"} == TOP[package]


def test_no_class_name_stands_in_two_modules_of_the_product() -> None:
    places: dict[str, set[str]] = {}
    for path in files(*PACKAGES, "cli"):
        for node in nodes(path):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, set()).add(str(path.relative_to(ROOT)))

    assert {name: sorted(where) for name, where in places.items() if len(where) > 1} == {}


@pytest.mark.parametrize("part", ["shared", "worker"])
def test_no_file_name_stands_twice_where_one_wing_reaches_both(part: str) -> None:
    """Routes and commands are named after their noun; the trainer imports the contract alone.

    Of OpenAI's evals the requests stand in the contract and the verbs among the chores.
    """
    places: dict[str, set[str]] = {}
    for path in files(part):
        if path.stem != "__init__" and not path.is_relative_to(ROOT / "worker/train"):
            places.setdefault(path.stem, set()).add(str(path.relative_to(ROOT)))

    assert {name: sorted(where) for name, where in places.items() if len(where) > 1 and name != "evals"} == {}


def test_tests_are_no_package() -> None:
    # One tests/api/__init__.py would turn `tests/api` into `api` and hide the real one.
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_the_inits_of_packages_are_empty() -> None:
    inits = [path for path in files(*PACKAGES) if path.name == "__init__.py" and path.parent.parent == ROOT]

    assert {path.parent.name for path in inits} == set(PACKAGES)
    assert [path for path in inits if path.read_text().strip()] == []


def test_the_environment_is_read_in_settings_only() -> None:
    readers = {
        at(path, node)
        for path in files(*PACKAGES)
        for node in nodes(path)
        if isinstance(node, ast.Attribute | ast.Name)
        and dotted(node) in {"os.environ", "os.environb", "os.getenv", "os.putenv", "environ", "getenv"}
        and path != ROOT / "shared/settings.py"
    }

    assert readers == set()


def test_every_moment_is_aware_of_its_time_zone() -> None:
    naive = {at(path, node) for path in files(*SOURCE, "examples", "bench") for node in nodes(path) if _is_naive(node)}

    assert naive == set()


def _is_naive(node: ast.AST) -> bool:
    match node:
        case ast.Attribute(attr="utcnow" | "utcfromtimestamp"):
            return True
        case ast.Call(func=function, args=[], keywords=[]):
            return dotted(function) in {"datetime.now", "datetime.datetime.now"}
    return False


# ---- who tells methods and objectives apart

# Their names, tables and request; the trainer's table of losses; and the formats of rows, of which one is called kto.
KNOWS_NAMES = {
    "shared/contract/spec.py",
    "shared/contract/methods.py",
    "shared/contract/objectives.py",
    "worker/train/objectives/table.py",
    "shared/rows/formats.py",
    "shared/rows/rules.py",
    "worker/train/data.py",
}
NAMES = frozenset(get_args(MethodName)) | frozenset(get_args(ObjectiveName))


def test_nobody_but_the_tables_branches_on_the_name_of_a_method_or_an_objective() -> None:
    branches = [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', '?')}"
        for path in files(*PACKAGES)
        if str(path.relative_to(ROOT)) not in KNOWS_NAMES
        for node in nodes(path)
        if _branches_on_a_name(node)
    ]

    assert branches == []


def _branches_on_a_name(node: ast.AST) -> bool:
    """Whether the node compares with a name, or looks one up: in a comparison, a pattern, a dict, or a `.get`."""
    match node:
        case ast.Compare(left=left, comparators=others):
            return any(_names_one(leaf) for side in (left, *others) for leaf in ast.walk(side))
        case ast.MatchValue(value=value):
            return _names_one(value)
        case ast.Dict(keys=keys) if keys:
            return all(key is not None and _names_one(key) for key in keys)
        case ast.Call(func=ast.Attribute(attr="startswith" | "endswith"), args=arguments):
            return any(_names_one(leaf) for argument in arguments for leaf in ast.walk(argument))
    return False


def _names_one(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value in NAMES


@pytest.mark.parametrize(
    ("line", "branches"),
    [
        ("rows = 2 if spec.objective.type == 'dpo' else 1", True),
        ("if method not in ('qlora', 'qdora'): pass", True),
        ("formats = {'dpo': 1, 'kto': 2}", True),
        ("match name:\n    case 'kto': pass", True),
        ("OBJECTIVES[spec.objective.type].sequences", False),
        ("example = {'type': 'supervised', 'seed': 1}", False),
        ("if status == 'failed': pass", False),
    ],
)
def test_the_scan_for_branches_sees_what_it_must(line: str, branches: bool) -> None:
    assert any(_branches_on_a_name(node) for node in ast.walk(ast.parse(line))) is branches


# ---- who writes the status of a job


def test_only_one_package_moves_jobs() -> None:
    knows_jobs = {path: "JobRow" in path.read_text() for path in files(*PACKAGES)}
    writers = {
        at(path, node)
        for path in files(*PACKAGES)
        if ROOT / "shared/jobs" not in path.parents
        for node in nodes(path)
        if _moves_a_job(node, knows_jobs=knows_jobs[path])
    }

    assert writers == set()


def test_jobs_are_born_unchecked() -> None:
    births = [
        (at(path, key), ast.unparse(value))
        for path in files(*PACKAGES)
        if "insert into jobs" in path.read_text()
        for node in nodes(path)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "status"
    ]
    rows = [
        at(path, node)
        for path in files(*PACKAGES)
        for node in nodes(path)
        if isinstance(node, ast.Call) and dotted(node.func) == "JobRow" and (node.args or node.keywords)
    ]

    assert rows == [], "a row that the statement of shared/jobs/submission.py does not store"
    assert births, "nothing makes jobs?"
    assert [place for place, status in births if status != "'validating_files'"] == []


def _moves_a_job(node: ast.AST, *, knows_jobs: bool) -> bool:
    """Whether the node writes `status`: on a row, in an UPDATE of JobRow, or in SQL of its own."""
    match node:
        case ast.Assign(targets=targets):
            return knows_jobs and any(
                isinstance(target, ast.Attribute) and target.attr == "status" for target in targets
            )
        case ast.AugAssign(target=ast.Attribute(attr="status")) | ast.AnnAssign(target=ast.Attribute(attr="status")):
            return knows_jobs
        case ast.Call(func=ast.Attribute(attr="values"), keywords=words) if "JobRow" in ast.unparse(node):
            return any(word.arg in {"status", None} for word in words)
        case ast.Call(func=ast.Name(id="setattr")):
            return knows_jobs
        case ast.Constant(value=str(text)):
            return re.search(r"\bupdate\s+jobs\b", text, re.IGNORECASE) is not None
    return False


@pytest.mark.parametrize(
    ("line", "moves"),
    [
        ("job.status = 'failed'", True),
        ("session.execute(update(JobRow).where(JobRow.id == i).values(status='failed'))", True),
        ("session.execute(update(JobRow).values(**what))", True),
        ("session.execute(update(JobRow).values(priority=1))", False),
        ("session.execute(update(FileRow).values(status='error'))", False),
        ("session.execute(text('UPDATE jobs SET status = 1'))", True),
        ("setattr(job, 'status', 'failed')", True),
        ("if job.status == 'failed': pass", False),
    ],
)
def test_the_scan_for_writers_sees_what_it_must(line: str, moves: bool) -> None:
    assert any(_moves_a_job(node, knows_jobs=True) for node in ast.walk(ast.parse(line))) is moves


# ---- states (docs/lifecycle.md lists the moves; tests/moves.py watches every move that the suite's processes make)


def test_the_page_of_states_lists_no_way_out_of_an_ended_job() -> None:
    moves_listed = listed()

    assert ("running", "succeeded") in moves_listed
    assert {state for move in moves_listed for state in move} == set(JOB_STATUSES)
    assert {before for before, _ in moves_listed} == set(JOB_STATUSES) - TERMINAL


# ---- the pages about the house

OF_THE_HOUSE = ("docs/architecture.md", "docs/extending.md", "CONTRIBUTING.md", "docs/trainer.md", "docs/glossary.md")


@pytest.mark.parametrize("page", OF_THE_HOUSE)
def test_every_source_file_and_module_that_a_page_names_exists(page: str) -> None:
    codes = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S))
    places = {
        name if name.endswith(".py") else f"{name.replace('.', '/')}"
        for name in codes
        if re.fullmatch(r"(\w+/)+\w+\.py|(worker|shared|api|standalone|tests)(\.[a-z_]\w*)+", name)
    }

    assert [place for place in sorted(places) if not _is_there(place)] == []


def _is_there(place: str) -> bool:
    """A file, a module or package, or what stands in a module."""
    file = ROOT / place
    return file.exists() or file.with_suffix(".py").exists() or file.parent.with_suffix(".py").exists()


def test_every_program_that_renders_or_loads_is_in_the_table_of_programs() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    programs = [
        path.stem
        for path in files("worker/train")
        if path.stem not in {"__main__", "convert_gguf"} and "if __name__ ==" in path.read_text(encoding="utf-8")
    ]

    assert len(programs) >= 9
    assert [name for name in programs if f"worker.train.{name}`" not in page] == []


# ---- figures that the best services keep


def test_functions_are_short() -> None:
    lengths = sorted(
        node.end_lineno - node.lineno + 1 for path in files(*SOURCE) for node in functions(path) if node.end_lineno
    )

    assert statistics.median(lengths) <= 10
    assert lengths[int(0.9 * len(lengths))] < 45
    assert sum(length > 60 for length in lengths) / len(lengths) < 0.03


def test_no_file_of_the_product_has_more_than_400_lines() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files(*PACKAGES, "cli")}

    assert len(lengths) > 200
    assert {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > 400} == {}


def test_imports_stand_at_the_top() -> None:
    every = [at(path, node) for path in files(*SOURCE) for node in imports(tree(path))]
    inner = {at(path, node) for path in files(*SOURCE) for function in functions(path) for node in imports(function)}

    assert len(inner) / len(every) <= 0.02, sorted(inner)


def test_errors_are_caught_by_name() -> None:
    broad = [
        at(path, node)
        for path in files(*SOURCE)
        for node in nodes(path)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"})
    ]
    lines = sum(bool(line.strip()) for path in files(*SOURCE) for line in path.read_text().splitlines())

    assert len(broad) < max(1, lines / 1000), broad


# ---- what users can be told is written down


def test_every_error_code_is_explained() -> None:
    explained = (ROOT / "docs/failures.md").read_text(encoding="utf-8")
    codes = {code: place for path in files("shared", "api", "worker") for code, place in _error_codes(path)}

    assert len(codes) > 20
    assert {code: place for code, place in codes.items() if f"`{code}`" not in explained} == {}


# Calls that name a code, and which of their arguments it is.
CODE_ARGUMENT = {"error_document": 0, "refuse": 1, "warn": 1, "_Refused": 0, "BadJson": 0, "at_start": 0}


def _error_codes(path: Path) -> Iterator[tuple[str, str]]:
    """Literal codes: of an error class, a `code=`, a `"code":`, a finding of the file check, or a function `…_code`."""
    for node in nodes(path):
        for value in _code_values(node):
            for leaf in ast.walk(value):
                if isinstance(leaf, ast.Constant) and re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+", str(leaf.value)):
                    yield str(leaf.value), at(path, leaf)


def _code_values(node: ast.AST) -> list[ast.expr]:
    match node:
        case ast.Assign(targets=[ast.Name(id="code")], value=value) | ast.keyword(arg="code", value=value):
            return [value] if isinstance(value, ast.Constant | ast.IfExp) else []
        case ast.Dict(keys=keys, values=values):
            pairs = zip(keys, values, strict=True)
            return [value for key, value in pairs if isinstance(key, ast.Constant) and key.value == "code"]
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=arguments) if name in CODE_ARGUMENT:
            return arguments[CODE_ARGUMENT[name] : CODE_ARGUMENT[name] + 1]
        case ast.FunctionDef(name=name) if name.endswith("_code"):
            returns = [child.value for child in ast.walk(node) if isinstance(child, ast.Return) and child.value]
            return [value.body if isinstance(value, ast.IfExp) else value for value in returns] + [
                value.orelse for value in returns if isinstance(value, ast.IfExp)
            ]
    return []


def test_no_pattern_has_a_possessive_group() -> None:
    """Python before 3.11.5, which Debian 12 has, matches too little with them: arrays were refused as truncated."""
    possessive = re.compile(r"[^(]\)[*+?]\+|\(\?>")
    patterns = (
        (file.name, node.value)
        for file in files("api", "shared", "worker", "standalone", "cli/src", "examples")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
    )
    texts = ((name, text if isinstance(text, str) else text.decode("latin-1")) for name, text in patterns)

    assert possessive.search(r'(?:[^"]++|x)*+')
    assert [(name, text) for name, text in texts if possessive.search(text)] == []
