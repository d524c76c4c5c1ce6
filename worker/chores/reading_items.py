"""Reads the items of an evaluation, or of a run of OpenAI's evals, from its file, its request or a suite."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from shared.chores.evaluations import EvaluationClaim
from shared.contract.evals import RunOrder
from shared.contract.evaluation import CreateEvaluation, ItemsOfFile, ItemsOfSplit
from shared.errors import Invalid
from shared.rows import evaluation_items, general_suite, run_items
from shared.rows.evaluation_items import EvaluationItem
from worker.host.host import Host
from worker.program import workdir
from worker.program.workdir import Workdir

_NONE: Final = "There is no item: the file has no row, or none falls into the share."
_ONLY_FAULTS: Final = "None of the {} rows is an item. Line {}: {} Give another file."


def read(host: Host, claim: EvaluationClaim, folder: Workdir, *, interrupt: Callable[[], None]) -> list[EvaluationItem]:
    """All items. Raises Invalid when there is none that can be asked.

    A run of OpenAI's evals ends all the same when each of its rows is at fault, as it does there: its `result_counts`
    say so.
    """
    request = claim.request
    if claim.file is None:
        items = _items(request, ())
    else:
        upload = workdir.stage_upload(host.store, claim.file, folder.root / "items.upload", interrupt=interrupt)
        with upload.open("rb") as lines:
            items = _items(request, lines)
        upload.unlink()
    if not items:
        raise Invalid(_NONE, param="items", code="no_items")
    first = items[0].fault
    if isinstance(request, CreateEvaluation) and first is not None and all(item.fault for item in items):
        raise Invalid(_ONLY_FAULTS.format(len(items), items[0].line, first.message), param="items", code="no_items")
    return items + (general_suite.general(part="forgetting") if request.forgetting else [])


def _items(request: CreateEvaluation | RunOrder, lines: Iterable[bytes]) -> list[EvaluationItem]:
    if isinstance(request, RunOrder):
        return list(run_items.items(request, lines))
    asked = request.items
    if isinstance(asked, ItemsOfFile | ItemsOfSplit):
        share = asked.share if isinstance(asked, ItemsOfSplit) else 1.0
        return list(evaluation_items.items(lines, most=asked.max_items, share=share))
    return general_suite.general(part="items")
