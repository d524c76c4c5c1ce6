"""The processes of the suite share the work of compiling its files (tests/compiled.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from _pytest.assertion import rewrite

from tests.compiled import compile_share, kept_form


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    made = [tmp_path / f"test_{number}.py" for number in range(5)]
    for number, file in enumerate(made):
        file.write_text(f"def test() -> None:\n    answer = {number}\n    assert answer == 42\n")
    return made


def test_each_file_is_in_one_share(files: list[Path], pytestconfig: pytest.Config) -> None:
    shares = []
    for number in range(3):
        before = {file for file in files if kept_form(file).exists()}
        compile_share(files, pytestconfig, number=number, of=3)
        shares.append({file for file in files if kept_form(file).exists()} - before)

    assert sorted(map(len, shares)) == [1, 2, 2]
    assert set().union(*shares) == set(files)


def test_what_is_kept_is_what_pytest_reads_with_its_assertions_rewritten(
    files: list[Path], pytestconfig: pytest.Config
) -> None:
    compile_share(files, pytestconfig, number=0, of=1)
    code = rewrite._read_pyc(files[3], kept_form(files[3]))
    assert code is not None
    names: dict[str, object] = {}
    exec(code, names)  # noqa: S102 -- lines of this file

    with pytest.raises(AssertionError, match="assert 3 == 42"):
        names["test"]()  # type: ignore[operator]


def test_a_file_that_has_changed_is_compiled_anew_and_the_others_are_not(
    files: list[Path], pytestconfig: pytest.Config
) -> None:
    compile_share(files, pytestconfig, number=0, of=1)
    before = [kept_form(file).stat().st_ino for file in files]
    files[1].write_text("changed = True\n")

    compile_share(files, pytestconfig, number=0, of=1)

    after = [kept_form(file).stat().st_ino for file in files]
    assert [one != other for one, other in zip(before, after, strict=True)] == [False, True, False, False, False]
    assert rewrite._read_pyc(files[1], kept_form(files[1])) is not None
