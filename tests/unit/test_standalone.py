"""The launcher's pure parts: when to start again, what a log says, who may pass, what a home remembers."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest
from pydantic import SecretStr

from shared.settings import Settings
from shared.tenants.secret_box import SecretBox
from standalone.home import Home, HomeInUse, HomeUnusable
from standalone.postgres import ServerUser
from standalone.processes import LONGEST_PAUSE_SECONDS, STEADY_SECONDS, Backoff
from standalone.sockets import forget_socket_dir, make_socket_dir, noted_socket_dir
from standalone.up import PortTaken, free_port, own_environment
from standalone.valkey import could_not_read_its_file


def test_a_child_that_keeps_dying_is_started_ever_more_slowly_up_to_a_limit() -> None:
    backoff = Backoff()

    pauses = [backoff.after(ran_seconds=0) for _ in range(12)]

    assert pauses[:3] == [0.5, 1.0, 2.0]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE_SECONDS


def test_a_child_that_ran_for_long_is_started_again_at_once() -> None:
    backoff = Backoff()
    for _ in range(12):
        backoff.after(ran_seconds=0)

    assert backoff.after(ran_seconds=STEADY_SECONDS + 1) == 0.5


@pytest.mark.parametrize(
    ("log_end", "damaged"),
    [
        ("Valkey is starting\nServer initialized\nReady to accept connections", False),
        ("Valkey is starting\nBad file format reading the append only file appendonly.aof.1.incr.aof: make a", True),
        ("Valkey is starting\nFATAL AOF MANIFEST FILE ERROR\nInvalid AOF manifest file format", True),
        ("Bad file format reading the append only file\nValkey is starting\nReady to accept connections", False),
        ("", False),
    ],
)
def test_only_the_last_run_says_whether_the_bells_file_is_damaged(log_end: str, damaged: bool) -> None:
    assert could_not_read_its_file(log_end) is damaged


@pytest.mark.parametrize(
    ("mode", "same_user", "same_group", "lets_through"),
    [
        (0o700, False, False, False),
        (0o711, False, False, True),
        (0o710, False, False, False),
        (0o710, False, True, True),
        (0o700, True, False, True),
        (0o077, True, False, False),  # the owner's bits count alone, even where others may more
    ],
)
def test_a_folder_lets_through_whom_its_bits_name(
    tmp_path: Path, mode: int, same_user: bool, same_group: bool, lets_through: bool
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(mode)
    owner = folder.stat()
    user = ServerUser(owner.st_uid + (not same_user), owner.st_gid + (not same_group), switched=True)

    assert user.may(folder) is lets_through
    folder.chmod(0o700)


def test_one_closed_folder_on_the_way_keeps_a_user_out(tmp_path: Path) -> None:
    inner = tmp_path / "closed" / "open"
    inner.mkdir(parents=True)
    inner.chmod(0o755)
    (tmp_path / "closed").chmod(0o700)
    stranger = ServerUser(inner.stat().st_uid + 1, inner.stat().st_gid + 1, switched=True)

    assert not stranger.can_enter(inner)
    assert ServerUser(stranger.uid, stranger.gid, switched=False).can_enter(inner)


def test_credentials_are_for_their_owner_alone(tmp_path: Path) -> None:
    home = Home(tmp_path)

    home.write_credentials(base_url="http://127.0.0.1:1/v1", api_key="tp_1")

    assert stat.S_IMODE(home.credentials.stat().st_mode) == 0o600
    assert home.known_key() == "tp_1"
    assert [path.name for path in tmp_path.iterdir()] == ["credentials.json"]


@pytest.mark.parametrize("content", [None, "", "{", "[]", '"x"', "{}", '{"api_key": ""}'])
def test_credentials_that_say_nothing_are_no_key(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "credentials.json").write_text(content)

    assert Home(tmp_path).known_key() == ""


def test_the_key_of_stored_secrets_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert home.secrets_key() == ""  # whoever only uses a home makes none

    home.make_secrets_key()
    key = home.secrets_key()
    home.make_secrets_key()

    assert home.secrets_key() == key
    assert stat.S_IMODE((tmp_path / "secrets-key").stat().st_mode) == 0o600
    box = SecretBox(Settings(secrets_key=SecretStr(key)))
    assert box.open(box.close("whsec_x")) == "whsec_x"
    assert own_environment(home, Settings())["TUNEPOOL_SECRETS_KEY"] == key


def test_a_home_is_held_once_and_free_again_afterwards(tmp_path: Path) -> None:
    refused = pytest.raises(HomeInUse, match=r"already runs in .* \(process \d+\)")
    with Home(tmp_path).held(), refused, Home(tmp_path).held():
        pass
    with Home(tmp_path).held():
        pass


def test_a_home_below_a_file_is_refused_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(HomeUnusable, match=r"file/home.*--home"):
        Home(tmp_path / "file" / "home").prepare()


def test_a_taken_port_is_refused_and_a_free_one_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(PortTaken, match="--port 0"):
            free_port(taken.getsockname()[1])

        assert free_port(0) != taken.getsockname()[1]


def test_sockets_have_short_private_folders_and_a_new_one_replaces_the_last(tmp_path: Path) -> None:
    note = tmp_path / ("long" * 40) / "socket-location"

    first = make_socket_dir(note)
    second = make_socket_dir(note)

    assert not first.exists()
    assert noted_socket_dir(note) == second
    assert stat.S_IMODE(second.stat().st_mode) == 0o700
    assert len(str(second / ".s.PGSQL.5432.lock")) < 60
    forget_socket_dir(note)
    assert not second.exists()
    assert noted_socket_dir(note) is None


def test_a_note_that_names_a_folder_of_somebody_else_removes_nothing(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    note = tmp_path / "socket-location"
    note.write_text(str(precious))

    forget_socket_dir(note)

    assert precious.is_dir()


def test_nobody_else_on_the_host_may_enter_the_logs_or_the_store_of_a_home(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    (home.path / "storage").mkdir(parents=True, mode=0o755)

    home.prepare()

    assert [(home.path / name).stat().st_mode & 0o777 for name in ("logs", "storage")] == [0o700, 0o700]
