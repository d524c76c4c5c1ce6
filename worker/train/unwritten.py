"""Counts the rows of a file that their chat template does not write, or not whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from shared.contract.events import SHOWN, Rows, UnwrittenRows
from shared.errors import Invalid
from worker.train.call_ids import CallIds
from worker.train.written import MissingText

KEPT_AS_TEXT: Final = "control_token_text"
PARSED: Final = "control_tokens_parsed"
DROPPED: Final = "history_reasoning_dropped"
MAPPED: Final = "call_ids_mapped"
ADDED: Final = "template_adds_words"
ENDLESS: Final = "no_end_of_turn"
# Nothing is lost in such rows.
TOLD_AS_IT_IS: Final = frozenset({KEPT_AS_TEXT, PARSED, DROPPED, MAPPED, ADDED, ENDLESS})

_TOO_MANY: Final = 20  # each may have taken the whole time that a template is given


class PromptLosses:
    """What prompts lost: per kind how many rows, the first of them, and what was lost there."""

    def __init__(self) -> None:
        self._kinds: dict[str, UnwrittenRows] = {}

    def add(self, row: int, lost: Sequence[MissingText]) -> None:
        """Count what `row` lost; a row counts once per kind."""
        for code, loss in {loss.code: loss for loss in reversed(lost)}.items():
            self._add(UnwrittenRows(code=code, message=message_of(loss), rows=Rows(count=1, rows=[row])))

    def extend(self, later: Iterable[UnwrittenRows]) -> None:
        """Take over what later rows of the same file lost."""
        for entry in later:
            self._add(entry)

    def _add(self, new: UnwrittenRows) -> None:
        known = self._kinds.get(new.code)
        if known is None:
            self._kinds[new.code] = new
            return
        rows = Rows(count=known.rows.count + new.rows.count, rows=(known.rows.rows + new.rows.rows)[:SHOWN])
        self._kinds[new.code] = known.model_copy(update={"rows": rows})

    def entries(self) -> list[UnwrittenRows]:
        return list(self._kinds.values())


def message_of(lost: MissingText) -> str:
    """What a row lost, or is to be known of it, as a sentence."""
    if lost.code in TOLD_AS_IT_IS:
        return lost.what
    where = "the row's tools" if lost.message is None else f"messages[{lost.message}]"
    message = f"The chat template leaves out what {where} says: {lost.what}. The model will not see it."
    return f"{message} {lost.remedy}".rstrip()


def kept_as_text(token: str, *, raw: bool) -> MissingText:
    """A row whose own text spells a control token."""
    hint = ' To read such text as tokens, set training.special_tokens to "parse".' if raw else ""
    return MissingText(
        None, KEPT_AS_TEXT, f"The row's own text spells the control token {token}: it is trained as text.{hint}"
    )


def parsed(token: str) -> MissingText:
    """A raw row whose text is read as the job asks for."""
    return MissingText(
        None, PARSED, f'{token} in the row\'s text is read as a control token: training.special_tokens is "parse".'
    )


def history_dropped() -> MissingText:
    """A row whose earlier answers lost their reasoning because the job asks for it."""
    return MissingText(
        None, DROPPED, "The reasoning of earlier answers is left out, as training.drop_history_reasoning asks."
    )


def words_added(words: str) -> MissingText:
    """A row with an answer into which its template writes what the row does not say."""
    return MissingText(None, ADDED, f"The chat template writes words of its own into a trained answer: {words!r}.")


def never_ended(end: str) -> MissingText:
    """A row with a trained answer behind which no token ends the turn; `end`: the text that does, if there is one."""
    remedy = "write eos_token behind each answer in training.chat_template, or choose another base model."
    what = (
        f"The chat template ends an answer with text, {end!r}, which is no token: servers stop there only where they"
        " are told to (stop). To teach an end that all of them know,"
        if end
        else "The chat template writes nothing that ends a turn behind a trained answer, so nothing teaches the model"
        " to stop there. To teach it,"
    )
    return MissingText(None, ENDLESS, f"{what} {remedy}")


def call_ids_mapped(wanted: CallIds) -> MissingText:
    """A row whose template takes calls with other ids only."""
    return MissingText(
        None, MAPPED, f"Ids of calls and of their results are written as {wanted.value}, as the template asks."
    )


class RefusedRows:
    """The rows that a trainer refuses. It goes on after the first to tell how many there are."""

    def __init__(self) -> None:
        self._first: tuple[int, Invalid] | None = None
        self._count = 0

    def add(self, row: int, error: Invalid) -> None:
        """Count `row`. Raises Invalid at once when there are too many to go on."""
        self._first = self._first or (row, error)
        self._count += 1
        if self._count == _TOO_MANY:
            self.tell()

    def tell(self) -> None:
        """Raise the first row's error with its number, if there is one."""
        if self._first is None:
            return
        row, error = self._first
        at_least = "at least " if self._count == _TOO_MANY else ""
        more = f" ({at_least}{self._count} rows are refused.)" if self._count > 1 else ""
        raise Invalid(f"Row {row}: {error.message}{more}", code=error.code, param=error.param)
