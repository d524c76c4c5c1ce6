"""What is kept of a trainer's output: plain lines, no secrets, the beginning and the end."""

from __future__ import annotations

import fcntl
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.contract.events import CheckpointSaved
from shared.jobs import trainer_log
from shared.jobs.trainer_log import LogText
from shared.rows.log_lines import SHOWN_CHARACTERS, LogLines, safe_words
from shared.rows.secrets import HIDDEN, SecretFilter, hidden
from worker.attempt import kept_log
from worker.attempt.kept_log import HEAD_BYTES, LIVE_BYTES, SEGMENT_BYTES, SEGMENTS, KeptLog, left_behind, whole
from worker.train.reporting import Reporter

JOB = "ftjob-0193a1b2c3d4e5f60718293a4b5c6d7e"
KEY = "abcdefghijklmnopqrstuvwxyz0123456789"


def lines(*chunks: bytes) -> list[str]:
    reader = LogLines()
    read = [line for chunk in chunks for line in reader.feed(chunk)]
    return [*read, *reader.feed(b"", final=True)]


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        (f"key sk-{KEY}", f"key {HIDDEN}"),
        (f"HF_TOKEN=hf_{KEY}", f"HF_TOKEN={HIDDEN}"),
        (f"tp_{KEY}_1aZ", HIDDEN),
        ("postgresql+psycopg://tuner:p%40ss@db:5432/pool", f"postgresql+psycopg://{HIDDEN}@db:5432/pool"),
        (f"https://{KEY}@github.com/team/private", f"https://{HIDDEN}@github.com/team/private"),
        ("Authorization: Basic dXNlcjpwYXNz", f"Authorization: {HIDDEN}"),
        (f'headers={{"authorization": "Bearer {KEY}"}}', f'headers={{"authorization": "{HIDDEN}"}}'),
        (f"curl -H 'X: Bearer {KEY}'", f"curl -H 'X: Bearer {HIDDEN}'"),
        (
            f"GET https://s3/b/k?X-Amz-Date=2026&X-Amz-Signature={KEY}&a=1",
            f"GET https://s3/b/k?X-Amz-Date=2026&X-Amz-Signature={HIDDEN}&a=1",
        ),
        ('AWS_SECRET_ACCESS_KEY="a b c d"', f"AWS_SECRET_ACCESS_KEY={HIDDEN}"),
        ("db password: hunter22", f"db password: {HIDDEN}"),
        ("token eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln", f"token {HIDDEN}"),
    ],
)
def test_what_looks_like_a_secret_is_hidden_in_a_log(line: str, kept: str) -> None:
    assert hidden(line) == kept


@pytest.mark.parametrize(
    "line",
    [
        "Step 10/20: training loss=0.42, tokens=123456789012345678",
        "num_input_tokens_seen: 16384",
        "mail to ops@example.org about https://example.org/a?b=c",
        "eos_token: </s>",
        'File "/srv/trainer.py", line 10, in main',
    ],
)
def test_what_is_no_secret_stays_in_a_log(line: str) -> None:
    assert hidden(line) == line


def test_a_private_key_is_hidden_over_all_its_lines_and_the_log_goes_on() -> None:
    hide = SecretFilter()
    printed = ["a -----BEGIN RSA PRIVATE KEY-----", "MIIEpAIBAAKCAQEA", "-----END RSA PRIVATE KEY-----", "b"]

    assert [hide(line) for line in printed] == [f"a {HIDDEN}", HIDDEN, HIDDEN, "b"]


def test_a_secret_that_comes_in_two_pieces_is_hidden() -> None:
    assert lines(f"key sk-{KEY[:10]}".encode(), f"{KEY[10:]}\n".encode()) == [f"key {HIDDEN}\n"]


def test_a_secret_with_a_colour_in_it_is_hidden() -> None:
    assert lines(f"sk-{KEY[:5]}\x1b[31m{KEY[5:]}\n".encode()) == [f"{HIDDEN}\n"]


def test_a_log_gives_no_orders_to_a_terminal() -> None:
    printed = b"\x1b[2J\x1b]0;title\x07red\x1b[0m \x9b1m \xff\x00 \xe2\x80\xae<img>\n"

    [line] = lines(printed)

    assert "\x1b" not in line
    assert line.endswith(" \ufffd<img>\n")
    assert line.startswith("red ")
    assert line[:-1].isprintable()


def test_a_progress_bar_that_writes_over_itself_becomes_lines() -> None:
    assert lines(b"10%\r20%", b"\r\nend") == ["10%\n", "20%\n", "end\n"]


def test_a_character_that_comes_in_two_pieces_is_whole() -> None:
    assert lines("ü".encode()[:1], "ü".encode()[1:] + b"\n") == ["ü\n"]


def test_a_line_without_an_end_is_cut_and_the_rest_of_it_costs_no_memory() -> None:
    reader = LogLines()
    for _ in range(100):
        assert list(reader.feed(b"x" * 65536)) == []
        assert len(reader._begun) < 3 * 8000

    [line] = reader.feed(b"\n")

    assert line.startswith("x" * SHOWN_CHARACTERS + " …")
    assert len(line) < SHOWN_CHARACTERS + 100


def test_last_words_in_our_own_log_hold_no_secret() -> None:
    assert safe_words(f"a\x1b[0m\nsk-{KEY}") == f"a\n{HIDDEN}"


# --- on the host ------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[KeptLog]:
    log = KeptLog(tmp_path, JOB, 3)
    yield log
    log.let_go()


def test_a_short_log_is_kept_whole(kept: KeptLog) -> None:
    kept.write(b"a\nb")
    kept.finish()

    log = whole(kept.folder)

    assert log.content == b"a\nb\n"
    assert (log.head_bytes, log.tail_from, log.size) == (4, 4, 4)


def test_of_a_long_log_the_beginning_and_the_end_are_kept_and_a_line_says_what_is_not(kept: KeptLog) -> None:
    count = 3 * (HEAD_BYTES + SEGMENTS * SEGMENT_BYTES) // 1000
    for number in range(count):
        kept.write(f"{number:08d} {'x' * 990}\n".encode())
    kept.finish()

    log = whole(kept.folder)
    text = log.content.decode()

    assert log.size == count * 1000
    assert len(log.content) <= HEAD_BYTES + SEGMENTS * SEGMENT_BYTES + 100
    assert text.startswith("00000000 ")
    assert text.splitlines()[-1].startswith(f"{count - 1:08d} ")
    assert f"[{log.tail_from - log.head_bytes:,} bytes of this log are left out here]" in text
    assert log.content[log.tail_at :].decode().startswith(f"{log.tail_from // 1000:08d} ")
    assert log.size - log.tail_from >= (SEGMENTS - 1) * SEGMENT_BYTES - 2000


def test_what_is_told_live_is_told_once_and_the_newest_wins(kept: KeptLog) -> None:
    kept.write(b"a\n")
    first = kept.news()
    assert first is not None
    kept.write(b"b\n")
    kept.forget(first)
    second = kept.news()
    assert second is not None
    assert (second.start, second.text, second.size) == (2, "b\n", 4)
    kept.forget(second)
    assert kept.news() is None

    for _ in range(300):
        kept.write(b"x" * 999 + b"\n")
    third = kept.news()

    assert third is not None
    assert len(third.text) <= LIVE_BYTES
    assert third.start + len(third.text) == third.size == 300_004


def test_a_disk_without_room_costs_lines_and_never_the_training(kept: KeptLog) -> None:
    kept._file.close()
    kept._file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115  # closed by `let_go`

    kept.write(b"a\n")
    news = kept.news()

    assert kept.fault == "OSError"
    assert news is not None
    assert news.text == "a\n"


def test_a_log_that_a_supervisor_holds_is_nobody_elses(kept: KeptLog, tmp_path: Path) -> None:
    with left_behind(tmp_path) as left:
        assert left == []

    kept.let_go()

    with left_behind(tmp_path) as left, left_behind(tmp_path) as again:
        assert [(log.job_id, log.fence) for log in left] == [(JOB, 3)]
        assert again == []
    with left_behind(tmp_path / "none") as left:
        assert left == []


def test_a_strange_folder_among_the_logs_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "..%2fx.1").mkdir()
    (tmp_path / "ftjob-1.1").write_text("no folder")

    with left_behind(tmp_path) as left:
        assert left == []
    assert kept_log.HEAD_BYTES > 0


# --- reading it -------------------------------------------------------------------------------------------------------


def read_through(parts: list[tuple[int, bytes]], *, limit: int) -> list[LogText]:
    texts, after = [], 0
    while (text := trainer_log.cut(parts, after=after, limit=limit)).next > after:
        texts.append(text)
        after = text.next
    return texts


def test_a_log_read_in_pieces_is_the_whole_log_and_a_gap_is_told() -> None:
    head, tail = "one\ntwo\nthrée\n".encode(), b"nine\nten\n"

    texts = read_through([(0, head), (100, tail)], limit=9)

    assert "".join(text.text for text in texts) == (head + tail).decode()
    assert [text.left_out for text in texts if text.left_out] == [100 - len(head)]
    assert all(text.text.endswith("\n") for text in texts)
    assert {text.size for text in texts} == {109}


def test_pieces_that_touch_are_read_as_one() -> None:
    assert trainer_log.cut([(0, b"a\n"), (2, b"b\n")], after=0, limit=100) == LogText("a\nb\n", 0, 4, 4, 0)


def test_the_end_of_a_log_begins_with_a_line() -> None:
    assert trainer_log.last([(0, b"first\nsecond\nthird\n")], limit=9) == LogText("third\n", 13, 19, 19, 0)
    assert trainer_log.last([], limit=9) == LogText("", 0, 0, 0, 0)


def test_reading_behind_the_end_waits_there() -> None:
    assert trainer_log.cut([(0, b"a\n")], after=2, limit=10) == LogText("", 2, 2, 2, 0)
    assert trainer_log.cut([(0, b"a\n")], after=50, limit=10) == LogText("", 2, 2, 2, 0)


def test_a_log_that_is_being_made_is_no_log_of_the_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[list[kept_log.LeftLog]] = []
    flock = fcntl.flock

    def looked_at_first(file: Any, how: int) -> None:
        """A sibling looks at the worst moment: the folder is there, and not locked yet."""
        if not looks:
            looks.append([])
            with kept_log.left_behind(tmp_path) as left:
                looks.append(left)
        flock(file, how)

    monkeypatch.setattr(kept_log.fcntl, "flock", looked_at_first)
    kept = KeptLog(tmp_path, "ftjob-1", 1)

    assert looks == [[], []]
    with kept_log.left_behind(tmp_path) as left:
        assert left == [], "it is held"
    kept.let_go()
    with kept_log.left_behind(tmp_path) as left:
        assert [log.job_id for log in left] == ["ftjob-1"]
        kept_log.remove(left[0].folder)
    (tmp_path / "ftjob-2.1.gone").mkdir()
    with kept_log.left_behind(tmp_path) as left:
        assert (left, list(tmp_path.iterdir())) == ([], [])


def test_what_a_dead_supervisor_had_begun_to_make_goes_and_what_a_living_one_makes_stays(tmp_path: Path) -> None:
    for name, age in (("ftjob-1.1.new", kept_log.MADE_SECONDS + 5), ("ftjob-2.1.new", 0.0)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, times=(time.time() - age,) * 2)

    with kept_log.left_behind(tmp_path) as left:
        assert (left, [folder.name for folder in tmp_path.iterdir()]) == ([], ["ftjob-2.1.new"])


def test_while_logs_cannot_be_sent_the_newest_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_log, "MOST_LEFT", 2)
    held = KeptLog(tmp_path, "ftjob-0", 1)
    for number in range(1, 6):
        KeptLog(tmp_path, f"ftjob-{number}", 1).let_go()
    for age, number in enumerate((0, 4, 2, 5, 1, 3)):
        os.utime(tmp_path / f"ftjob-{number}.1", times=(time.time() - age,) * 2)

    with kept_log.left_behind(tmp_path) as left:
        assert [log.job_id for log in left] == ["ftjob-2", "ftjob-4"]
    assert {folder.name for folder in tmp_path.iterdir()} == {"ftjob-0.1", "ftjob-2.1", "ftjob-4.1"}
    held.let_go()
    with kept_log.left_behind(tmp_path) as left:
        assert [log.job_id for log in left] == ["ftjob-4", "ftjob-0"], "it has just ended, however old it is"


def test_the_trainer_writes_each_event_into_its_log_as_a_line(tmp_path: Path) -> None:
    log = io.StringIO()
    reporter = Reporter(tmp_path / "events.jsonl", clock=lambda: 1767225600.0, log=log)

    reporter.say("two\nlines")
    reporter.write(CheckpointSaved, step=3, name="step-00000003", train_loss=0.123456789)

    assert log.getvalue().splitlines() == [
        "2026-01-01T00:00:00Z two lines",
        "2026-01-01T00:00:00Z checkpoint step=3 name=step-00000003 train_loss=0.123457",
    ]
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 2


def test_a_log_that_nobody_takes_ends_no_training(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as log:
        reporter = Reporter(tmp_path / "events.jsonl", clock=lambda: 1.0, log=log)
        reporter.say("one")
        reporter.say("two")
        os.dup2(os.open(os.devnull, os.O_WRONLY), log.fileno())  # what is left is let go

    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 2
