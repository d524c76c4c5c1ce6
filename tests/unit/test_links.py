"""Download links of the local store: exact, short-lived, and signed with a secret that is never empty."""

from __future__ import annotations

import base64
import json
import threading
from pathlib import Path

import pytest

from api.links import Links, make_links
from shared.errors import Forbidden, Invalid
from shared.settings import Settings

LINKS = Links(b"a secret", seconds=60)


def test_a_token_opens_exactly_what_it_was_made_for() -> None:
    assert LINKS.open(LINKS.make("proj_1/files/file-1", name="a ü.bin")) == ("proj_1/files/file-1", "a ü.bin")


def test_an_expired_token_opens_nothing() -> None:
    late = Links(b"a secret", seconds=-1).make("k", name="n")

    with pytest.raises(Forbidden) as refused:
        LINKS.open(late)

    assert refused.value.code == "expired_link"


def test_a_token_of_another_secret_opens_nothing() -> None:
    with pytest.raises(Forbidden):
        LINKS.open(Links(b"another secret", seconds=60).make("k", name="n"))


def test_a_token_with_another_key_or_a_later_end_opens_nothing() -> None:
    payload, _, signature = LINKS.make("mine", name="n").partition(".")
    content = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    for change in ({"key": "theirs"}, {"until": 2**40}):
        forged = base64.urlsafe_b64encode(json.dumps({**content, **change}).encode()).rstrip(b"=").decode()

        with pytest.raises(Forbidden):
            LINKS.open(f"{forged}.{signature}")


@pytest.mark.parametrize("junk", ["", ".", "a.b", "ä.ö", "." * 1000, "a" * 100_000])
def test_junk_opens_nothing(junk: str) -> None:
    with pytest.raises(Forbidden):
        LINKS.open(junk)


def test_every_process_of_a_home_signs_with_the_same_secret_and_others_do_not(tmp_path: Path) -> None:
    first, second = (make_links(Settings(home=tmp_path / "one")) for _ in range(2))
    other = make_links(Settings(home=tmp_path / "two"))

    assert second.open(first.make("k", name="n")) == ("k", "n")
    with pytest.raises(Forbidden):
        other.open(first.make("k", name="n"))


def test_processes_that_start_together_agree_on_one_secret(tmp_path: Path) -> None:
    made: list[Links] = []
    gate = threading.Barrier(8)

    def start() -> None:
        gate.wait()
        made.append(make_links(Settings(home=tmp_path)))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {links.make("k", name="n").partition(".")[2] for links in made if links.open(made[0].make("k", name="n"))}
    assert len(made) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["signing-secret"]


def test_the_secret_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    make_links(Settings(home=tmp_path))

    assert (tmp_path / "signing-secret").stat().st_mode & 0o077 == 0


def test_an_empty_secret_is_refused_and_never_signs(tmp_path: Path) -> None:
    (tmp_path / "signing-secret").write_text("")

    with pytest.raises(Invalid, match="delete it"):
        make_links(Settings(home=tmp_path))
