"""Writes an event file for TensorBoard by tensorboardX: `python -m worker.chores.event_file_program`.

One JSON object comes on standard input and one goes to standard output. The same points make the same bytes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

VERSION = "brain.Event:2"


def write(points: list[tuple[int, float, dict[str, float]]], file: Path) -> None:
    """A record that names the format, and one for each step; times are those of the job's events."""
    writer = RecordWriter(str(file))
    began = points[0][1] if points else 0.0
    writer.write(Event(wall_time=began, file_version=VERSION).SerializeToString())
    for step, at, figures in points:
        values = [Summary.Value(tag=name, simple_value=figures[name]) for name in sorted(figures)]
        writer.write(Event(wall_time=at, step=step, summary=Summary(value=values)).SerializeToString())
    writer.flush()
    writer.close()


def main() -> None:
    wanted: dict[str, Any] = json.load(sys.stdin)
    file = Path(wanted["scratch"], wanted["filename"])
    write(wanted["points"], file)
    json.dump({"bytes": file.stat().st_size}, sys.stdout)


if __name__ == "__main__":
    main()
