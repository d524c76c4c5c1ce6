"""The curves of a job, read from its result file, and drawn as a line of bars that is text everywhere."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from tunepool import official

if TYPE_CHECKING:
    from openai import OpenAI

Curves = dict[str, list[float]]
BARS: Final = "▁▂▃▄▅▆▇█"
SHOWN: Final = ("train_loss", "valid_loss")  # columns of the result file
WIDTH: Final = 40  # bars of a curve at the most


def of_job(client: OpenAI, job: dict[str, Any]) -> Curves:
    """Its losses by step; none where it has no result file any more. Raises what the client raises."""
    for file_id in (job.get("result_files") or [])[:1]:
        try:
            return read(client.files.content(file_id).text)
        except official.NotFoundError:
            break
    return {}


def read(text: str) -> Curves:
    """The losses of a result file. A cell that is empty or no finite number is no point."""
    rows = list(csv.DictReader(io.StringIO(text)))
    curves = {name: [value for row in rows if (value := _number(row.get(name))) is not None] for name in SHOWN}
    return {name: values for name, values in curves.items() if values}


def _number(cell: str | None) -> float | None:
    try:
        value = float(cell or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def bars(values: Sequence[float]) -> str:
    """Between the least and the greatest value. Of many each bar is the mean of its share."""
    count = min(WIDTH, len(values))
    ends = [len(values) * place // count for place in range(count + 1)]
    means = [sum(values[begin:end]) / (end - begin) for begin, end in itertools.pairwise(ends)]
    least, width = min(means), (max(means) - min(means)) or 1.0
    return "".join(BARS[round((mean - least) / width * (len(BARS) - 1))] for mean in means)
