"""What `strftime_now` writes in a chat template."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime
from typing import Final

Now = datetime | None  # None: the present, by the host's clock
_CLOCK: Final = "strftime_now"


@contextlib.contextmanager
def clock_stopped(template: str, *, at: Now) -> Iterator[None]:
    """Let `template` write the moment `at` while the body runs."""
    if at is None or _CLOCK not in template:
        yield
        return
    # Not at the top: a preflight says that it does without PyTorch before transformers is imported.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    compiled = _compile_jinja_template(template)  # the very object that transformers renders: it keeps them
    compiled.globals[_CLOCK] = at.strftime
    try:
        yield
    finally:
        del compiled.globals[_CLOCK]  # transformers' own lies beneath
