"""A program that native code has ended for want of memory: its exit code says crash, and its last words say why."""

from __future__ import annotations

import re
import signal
from typing import Final

from shared.contract.events import EXIT_DONE, EXIT_OUT_OF_MEMORY, EXIT_STOPPED, EXIT_USER_FAULT

# What is printed before the process ends itself, so that no exception tells of it: by bitsandbytes, by Rust's runtime
# (in the tokenizers and safetensors), and by that of C++.
_LAST_WORDS: Final = re.compile(
    r"^(Error out of memory at line \d+ in file "
    r"|memory allocation of \d+ bytes failed$"
    r"|terminate called after throwing an instance of 'std::bad_alloc')",
    re.MULTILINE,
)
_OWN_CODES: Final = frozenset({EXIT_DONE, EXIT_USER_FAULT, EXIT_OUT_OF_MEMORY, EXIT_STOPPED})


def settled_code(code: int, last_words: str) -> int:
    """The exit code by the contract of our programs: EXIT_OUT_OF_MEMORY where native code ended one for that.

    What a program has decided itself stays, and so does every signal but the one that `abort` raises.
    """
    native = code == -signal.SIGABRT or (code > 0 and code not in _OWN_CODES)
    return EXIT_OUT_OF_MEMORY if native and _LAST_WORDS.search(last_words) else code
