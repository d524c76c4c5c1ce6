"""By which exit codes and last words native code is known to have run out of memory."""

from __future__ import annotations

import signal

import pytest

from shared.contract.events import EXIT_DONE, EXIT_OUT_OF_MEMORY, EXIT_STOPPED, EXIT_USER_FAULT
from worker.program.native_memory import settled_code

BITSANDBYTES = "loading\nError out of memory at line 380 in file /src/csrc/pythonInterface.cpp\n"
RUST = "memory allocation of 49152 bytes failed\nnote: run with `RUST_BACKTRACE=1`\n"
CPLUSPLUS = "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n"


@pytest.mark.parametrize(
    ("code", "last_words"), [(1, BITSANDBYTES), (-signal.SIGABRT, RUST), (-signal.SIGABRT, CPLUSPLUS)]
)
def test_words_of_native_code_make_its_end_one_for_want_of_memory(code: int, last_words: str) -> None:
    assert settled_code(code, last_words) == EXIT_OUT_OF_MEMORY


@pytest.mark.parametrize(
    "last_words",
    [
        "Error an illegal memory access was encountered at line 90 in file /src/csrc/ops.cu\n",
        "ValueError: a row says Error out of memory at line 3 in file x\n",
        "terminate called after throwing an instance of 'std::runtime_error'\n",
        "",
    ],
)
@pytest.mark.parametrize("code", [1, -signal.SIGABRT])
def test_other_words_leave_it_a_crash(code: int, last_words: str) -> None:
    assert settled_code(code, last_words) == code


@pytest.mark.parametrize("code", [EXIT_DONE, EXIT_USER_FAULT, EXIT_STOPPED, -signal.SIGKILL, -signal.SIGTERM])
def test_what_a_program_or_another_signal_has_decided_stays(code: int) -> None:
    assert settled_code(code, BITSANDBYTES + RUST) == code
