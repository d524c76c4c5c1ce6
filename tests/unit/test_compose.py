"""The container files are checked by the tools that read them, without an engine and offline."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from shared.settings import Settings
from shared.settle.catalogue import load_catalogue
from tests.patience import patience
from worker import pulse

ROOT = Path(__file__).parents[2]
TOOLS = Path(sys.executable).parent
SECRETS = ("POSTGRES_PASSWORD", "VALKEY_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY", "TUNEPOOL_SIGNING_SECRET")
# Without the .env that an operator may have beside the file.
CONFIG = ("docker-compose", "--env-file", "/dev/null", "config")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{TOOLS}:/usr/bin:/bin"
    tool = str(TOOLS / command[0])
    return subprocess.run(
        [tool, *command[1:]],
        cwd=ROOT,
        env={"PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=patience(60),
        check=False,
    )


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The file as Compose resolves it: anchors, merges and variables applied."""
    done = run(*CONFIG, "--format", "json", **dict.fromkeys(SECRETS, "secret"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("missing", SECRETS)
def test_no_secret_has_a_default(missing: str) -> None:
    done = run(*CONFIG, "-q", **{name: "secret" for name in SECRETS if name != missing})

    assert done.returncode != 0
    assert missing in done.stderr


def made(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`make` with the project's Makefile, in a folder of the test's own."""
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "cli").mkdir(exist_ok=True)
    shutil.copy(ROOT / "cli/pyproject.toml", folder / "cli/pyproject.toml")
    return subprocess.run(
        ["make", *words],
        cwd=folder,
        env={"PATH": f"{TOOLS}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=patience(60),
        check=False,
    )


def test_make_env_writes_every_secret_once_for_its_owner_alone(tmp_path: Path) -> None:
    first = made(tmp_path, "env")
    written = (tmp_path / ".env").read_text()
    again = made(tmp_path, "env")

    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    secrets = dict(line.split("=") for line in written.splitlines())
    assert set(secrets) == set(SECRETS)
    assert len(set(secrets.values())) == len(SECRETS)
    assert all(re.fullmatch(r"[0-9a-f]{48}", value) for value in secrets.values())
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600
    assert (tmp_path / ".env").read_text() == written
    done = run("docker-compose", "--env-file", str(tmp_path / ".env"), "config", "-q")
    assert done.returncode == 0, done.stderr


INDEX = "TORCH_INDEX=https://index.example/whl"


def test_setup_takes_the_named_build_of_pytorch_and_keeps_to_it(tmp_path: Path) -> None:
    pinned = re.search(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None

    chosen, plain = made(tmp_path, "-n", "setup", "TORCH=cu126", INDEX), made(tmp_path, "-n", "setup")
    unknown = made(tmp_path, "setup", "TORCH=cu99")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.torch").write_text("cu128")
    kept = made(tmp_path, "-n", "test")

    assert f"--extra-index-url https://index.example/whl/cu126 torch=={pinned[1]}+cu126" in chosen.stdout
    assert "index" not in plain.stdout.lower()
    assert unknown.returncode != 0
    assert "cpu cu126 cu128 cu130" in unknown.stdout
    assert f"torch=={pinned[1]}+cu128" in kept.stdout


def test_the_image_takes_the_same_builds(compose: dict[str, Any]) -> None:
    named = dict.fromkeys(SECRETS, "secret") | {"TUNEPOOL_TORCH": "cu126"}
    other = json.loads(run(*CONFIG, "--format", "json", **named).stdout)

    assert compose["services"]["worker"]["build"]["args"]["TORCH"] == ""
    assert other["services"]["worker"]["build"]["args"]["TORCH"] == "cu126"
    assert "\nARG TORCH=\n" in (ROOT / "Dockerfile.gpu").read_text()


def test_the_compose_file_obeys_the_compose_specification() -> None:
    done = run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_passes_hadolint() -> None:
    done = run("hadolint", "Dockerfile.gpu")

    assert done.returncode == 0, done.stdout + done.stderr


def test_every_part_of_the_pool_is_there(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {"postgres", "valkey", "s3", "migrate", "api", "janitor", "worker", "playground"}


def test_nothing_starts_before_the_schema_is_current(compose: dict[str, Any]) -> None:
    for name in ("api", "janitor", "worker", "playground"):
        waits = compose["services"][name]["depends_on"]
        assert waits["migrate"]["condition"] == "service_completed_successfully", name
    assert compose["services"]["migrate"]["depends_on"]["postgres"]["condition"] == "service_healthy"


def test_api_and_worker_read_one_list_of_models_and_cannot_write_it() -> None:
    named = dict.fromkeys(SECRETS, "secret") | {"TUNEPOOL_MODELS_FILE": "/srv/models.toml", "HF_TOKEN": "hf_x"}
    named["HF_ENDPOINT"] = "https://mirror.example"
    services = json.loads(run(*CONFIG, "--format", "json", **named).stdout)["services"]

    asking = {"worker", "playground"}
    for name in ("api", *asking):
        file = services[name]["environment"]["TUNEPOOL_MODELS_FILE"]
        (mounted,) = [volume for volume in services[name]["volumes"] if volume["target"] == file]
        assert (mounted["source"], mounted["read_only"]) == ("/srv/models.toml", True)
    for variable, value in (("HF_TOKEN", "hf_x"), ("HF_ENDPOINT", "https://mirror.example")):
        assert {name for name in services if variable in services[name].get("environment", {})} == asking
        assert {services[name]["environment"][variable] for name in asking} == {value}


def test_the_playground_shares_the_workers_models_and_is_reached_by_its_name(compose: dict[str, Any]) -> None:
    playground, worker = compose["services"]["playground"], compose["services"]["worker"]

    assert playground["command"] == ["tunepool-server", "playground"]
    assert playground["environment"]["TUNEPOOL_PLAYGROUND_ADDRESS"] == "playground"
    assert playground["image"] == worker["image"]
    assert playground["deploy"] == worker["deploy"]
    state = [next(one["source"] for one in service["volumes"]) for service in (playground, worker)]
    assert state == ["worker-state", "worker-state"]
    assert playground["healthcheck"]["disable"], "the image's probe would tell of the worker"


def test_without_a_mirror_workers_ask_the_hub_itself(compose: dict[str, Any]) -> None:
    """An empty HF_ENDPOINT would be no address at all."""
    assert compose["services"]["worker"]["environment"]["HF_ENDPOINT"].startswith("https://")


def test_without_a_list_of_models_an_empty_one_is_mounted(compose: dict[str, Any]) -> None:
    (mounted,) = [one for one in compose["services"]["api"]["volumes"] if one["target"] == "/etc/tunepool/models.toml"]

    assert mounted["source"] == "/dev/null"
    assert load_catalogue(Settings(models_file=Path("/dev/null"))).complaints() == {}


def test_what_a_host_says_of_itself_reaches_what_works_there_and_nothing_is_passed_empty(
    compose: dict[str, Any], tmp_path: Path
) -> None:
    """In `.env`, as docs/gpu-hosts.md has it."""
    host = {"TUNEPOOL_DEVICES": "cpu", "TUNEPOOL_CACHE_BYTES": "100000000000", "NCCL_P2P_DISABLE": "1"}
    values = dict.fromkeys(SECRETS, "secret") | host
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in values.items()))

    done = run("docker-compose", "--env-file", str(tmp_path / ".env"), "config", "--format", "json")
    services = json.loads(done.stdout)["services"]

    for name in ("worker", "playground"):
        assert host.items() <= services[name]["environment"].items()
        assert all(compose["services"][name]["environment"].get(variable) is None for variable in host)


def test_every_variable_that_the_page_of_gpu_hosts_names_for_docker_is_passed() -> None:
    page = (ROOT / "docs/gpu-hosts.md").read_text()
    section = re.search(r"^## With Docker\n(.*?)^## ", page, re.MULTILINE | re.DOTALL)
    assert section is not None
    ours = {"OPENAI_BASE_URL", "OPENAI_API_KEY", "COMPOSE_FILE"}  # of the command line and of Compose, on any machine

    named = set(re.findall(r"\b[A-Z]+_[A-Z0-9_]+\b", section[1])) - ours

    assert len(named) >= 5
    assert not [name for name in named if name not in (ROOT / "docker-compose.yml").read_text()]


def test_what_works_on_strangers_rows_may_start_it_as_another_user_and_little_more(compose: dict[str, Any]) -> None:
    """That these rights are enough is shown in tests/lifecycle/test_images.py."""
    ordinary = {"api", "janitor", "migrate"}

    for name in ("worker", "playground"):
        service = compose["services"][name]
        assert (service["user"], service["cap_drop"]) == ("0:0", ["ALL"])
        assert set(service["cap_add"]) == {"CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "SETGID", "SETUID", "SYS_PTRACE"}
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not service.get("privileged")
    assert not [name for name in ordinary if "user" in compose["services"][name]], "they have the image's"


def test_the_worker_reserves_the_gpus(compose: dict[str, Any]) -> None:
    (device,) = compose["services"]["worker"]["deploy"]["resources"]["reservations"]["devices"]

    assert device["driver"] == "nvidia"
    assert device["capabilities"] == ["gpu"]


def test_on_a_host_without_the_toolkit_the_pool_is_the_same_and_trains_on_the_processor(
    compose: dict[str, Any], tmp_path: Path
) -> None:
    """By the second file on the command line, or named in `.env`, as docs/gpu-hosts.md has it."""
    files = ("docker-compose.yml", "docker-compose.cpu.yml")
    (tmp_path / ".env").write_text(
        "".join(f"{name}=secret\n" for name in SECRETS) + f"COMPOSE_FILE={':'.join(files)}\n"
    )
    named = (
        "--env-file",
        "/dev/null",
        *(word for file in files for word in ("-f", file)),
        "config",
        "--format",
        "json",
    )
    done = run("docker-compose", *named, **dict.fromkeys(SECRETS, "secret"))
    by_line = run("docker-compose", "--env-file", str(tmp_path / ".env"), "config", "--format", "json")
    assert done.returncode == by_line.returncode == 0, done.stderr + by_line.stderr
    rendered = json.loads(done.stdout)

    assert json.loads(by_line.stdout)["services"] == rendered["services"]
    for name in ("worker", "playground"):
        ours, theirs = rendered["services"][name], compose["services"][name]
        assert "deploy" not in ours, "the engine refuses a reservation that it cannot serve"
        assert ours["environment"] == theirs["environment"] | {"TUNEPOOL_DEVICES": "cpu"}
        base = ours["build"]["args"]["BASE"]
        assert ("cuda" in base, ":" in base, base.endswith(":latest")) == (False, True, False)
        asked = theirs["build"]["args"] | {"BASE": base}
        assert ours["build"] == theirs["build"] | {"args": asked}
    others = compose["services"].keys() - {"worker", "playground"}
    assert {name: rendered["services"][name] for name in others} == {name: compose["services"][name] for name in others}
    (tmp_path / "rendered.json").write_text(done.stdout)
    checked = run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(tmp_path / "rendered.json"))
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_only_the_api_is_published_and_only_on_loopback(compose: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in compose["services"].items() if service.get("ports")}

    assert set(published) == {"api"}
    assert [port["host_ip"] for port in published["api"]] == ["127.0.0.1"]


def test_every_image_is_pinned_to_a_version(compose: dict[str, Any]) -> None:
    pulled = [service["image"] for service in compose["services"].values() if "build" not in service]

    assert len(pulled) == 3
    assert not [image for image in pulled if ":" not in image.rpartition("/")[2] or image.endswith(":latest")]


def test_both_images_run_as_an_ordinary_user_and_say_when_they_are_ill() -> None:
    stages = (ROOT / "Dockerfile.gpu").read_text().split("\nFROM ")[1:]

    assert [stage.split("\n")[0].rpartition(" ")[2] for stage in stages] == ["api", "worker"]
    for stage in stages:
        lines = stage.splitlines()
        assert "USER 10001:10001" in lines
        assert any(line.startswith("HEALTHCHECK ") for line in lines)


def probes() -> list[list[str]]:
    """The commands of the images' health checks, in the order of the stages."""
    return [
        json.loads(found) for found in re.findall(r"^    CMD (\[.*\])$", (ROOT / "Dockerfile.gpu").read_text(), re.M)
    ]


def test_the_probe_of_the_api_asks_a_route_that_the_api_has() -> None:
    _, _, program = probes()[0]

    (path,) = re.findall(r"127\.0\.0\.1:8000(/[a-z]+)'", program)
    assert path in json.loads((ROOT / "tests/unit/openapi.json").read_text())["paths"]


def test_the_probe_of_the_worker_tells_a_beating_worker_from_a_silent_one(tmp_path: Path) -> None:
    _, *probe = probes()[1]

    def probed() -> int:
        environment = {"PATH": "/usr/bin:/bin", "TUNEPOOL_HOME": str(tmp_path)}
        return subprocess.run([sys.executable, *probe], cwd=ROOT, env=environment, check=False).returncode

    assert probed() == 1
    pulse.beat(tmp_path)
    assert probed() == 0
    long_ago = time.time() - 3600
    os.utime(tmp_path / "worker.pulse", (long_ago, long_ago))
    assert probed() == 1


def test_the_editable_install_of_an_image_learns_where_every_package_will_be() -> None:
    # An empty folder is no package to the build backend, and `tunepool-server` would then find no code.
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    touched = re.findall(r"&& touch (.*) \\\n && pip install", (ROOT / "Dockerfile.gpu").read_text())

    assert len(touched) == 2
    for files in touched:
        assert set(files.split()) == {f"{package}/__init__.py" for package in wheel["packages"]}


def test_the_api_image_has_no_training_stack() -> None:
    api, worker = (ROOT / "Dockerfile.gpu").read_text().split("\nFROM ")[1:]

    assert "requirements.api.lock" in api  # tests/unit/test_locks.py: which has none
    assert "requirements.worker.lock" not in api
    assert "requirements.worker.lock" in worker
