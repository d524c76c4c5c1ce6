"""Compares two runs: curves step by step, files by sha256, weights tensor by tensor. Pure.

Weights are read here without NumPy: safetensors is a header in JSON and numbers behind it
(github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import csv
import json
import math
import operator
import struct
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

# They name their job and say where it ran.
ABOUT_THE_RUN: Final = frozenset({"README.md", "run_manifest.json", "provenance.dsse.json"})
FLOOR: Final = 0.1  # figures below it are compared as if they were as large: a loss of 0.001 is noise
MAX_HEADER_BYTES: Final = 100 * 1024 * 1024
CHUNK_BYTES: Final = 4 * 1024 * 1024
WIDTHS: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class RelativeDifference:
    """`off`: the largest relative difference, 0 for what is equal. `first`: where it differs first, None where nowhere.

    `within`: whether it is as near as was asked for.
    """

    within: bool
    off: float
    first: str | None

    def document(self) -> dict[str, Any]:
        off = self.off if math.isfinite(self.off) else None  # JSON knows no infinity
        return {
            "equal": self.first is None,
            "within_tolerance": self.within,
            "off": off,
            "first_difference": self.first,
        }


def of_curves(then: str, now: str, *, tolerance: float) -> RelativeDifference:
    """Two `step_metrics.csv`. With tolerance 0 every figure must be the same to its last digit."""
    largest, first = 0.0, None
    for step, name, was, value in _cells(then, now):
        off = 0.0 if was == value else _off(was, value)
        if was != value and first is None:
            first = f"{name} of step {step}: {was or 'none'} then, {value or 'none'} now"
        largest = max(largest, off)
    return RelativeDifference(first is None or largest <= tolerance, largest, first)


def _cells(then: str, now: str) -> Iterator[tuple[int, str, str, str]]:
    """(step, column, then, now) of every figure of either, by step; an empty text where one has none."""
    before, after = ({int(row["step"]): row for row in csv.DictReader(text.splitlines())} for text in (then, now))
    for step in sorted(before.keys() | after.keys()):
        was, value = before.get(step, {}), after.get(step, {})
        for name in dict.fromkeys([*was, *value]):
            if name == "step":
                continue
            yield step, name, was.get(name) or "", value.get(name) or ""


def _off(was: str, value: str) -> float:
    try:
        a, b = float(was), float(value)
    except ValueError:
        return math.inf  # one of them has no such figure
    off = abs(a - b) / max(abs(a), abs(b), FLOOR)
    return off if math.isfinite(off) else math.inf


def of_files(then: Mapping[str, str], now: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """(names of files whose sha256 is the same; names of files that differ, or that one side lacks)."""
    names = sorted((then.keys() | now.keys()) - ABOUT_THE_RUN)
    same = [name for name in names if then.get(name) == now.get(name)]
    return same, [name for name in names if name not in same]


def of_weights(then: Path, now: Path, *, tolerance: float) -> RelativeDifference:
    """Two safetensors files. `off` is the distance of all weights, relative to their length: ‖a - b‖ / ‖a‖."""
    try:
        with then.open("rb") as a, now.open("rb") as b:
            return _of_tensors(a, b, tolerance=tolerance)
    except (ValueError, KeyError, TypeError, struct.error):
        return RelativeDifference(within=False, off=math.inf, first=f"{then.name}: its bytes, which are no safetensors")


def _of_tensors(then: BinaryIO, now: BinaryIO, *, tolerance: float) -> RelativeDifference:
    before, after = _header(then), _header(now)
    for name in sorted(before.keys() | after.keys()):
        was, value = before.get(name), after.get(name)
        if was is None or value is None:
            return RelativeDifference(within=False, off=math.inf, first=f"{name} is in one of them only")
        if (was["dtype"], was["shape"]) != (value["dtype"], value["shape"]):
            return RelativeDifference(within=False, off=math.inf, first=f"{name} has another type or shape")
    distance = length = 0.0
    first = None
    for name, place in before.items():
        far, long, largest = _distance(then, place, now, after[name])
        distance, length = math.hypot(distance, far), math.hypot(length, long)
        if far and first is None:
            first = f"{name}, by up to {largest:.3g}"
    off = distance / length if length else (math.inf if distance else 0.0)
    off = off if math.isfinite(off) else math.inf
    return RelativeDifference(off <= tolerance, off, first)


def _header(file: BinaryIO) -> dict[str, Any]:
    """Tensor by name: dtype, shape, and `at` from the beginning of the file to its end. Raises ValueError."""
    (size,) = struct.unpack("<Q", file.read(8))
    if size > MAX_HEADER_BYTES:
        raise ValueError(size)
    header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: {**entry, "at": tuple(8 + size + int(offset) for offset in entry["data_offsets"])}
        for name, entry in header.items()
    }


def _distance(
    then: BinaryIO, was: Mapping[str, Any], now: BinaryIO, value: Mapping[str, Any]
) -> tuple[float, float, float]:
    """(‖a - b‖, ‖a‖, the largest |a - b|) of one tensor; what are no numbers with a point differs as a whole."""
    (start, end), (other, _) = was["at"], value["at"]
    far = long = largest = 0.0
    for offset in range(0, end - start, CHUNK_BYTES):
        size = min(CHUNK_BYTES, end - start - offset)
        then.seek(start + offset)
        now.seek(other + offset)
        a, b = then.read(size), now.read(size)
        if was["dtype"] not in WIDTHS:
            far, largest = (far, largest) if a == b else (math.inf, math.inf)
            continue
        x = _numbers(a, was["dtype"])
        long = math.hypot(long, math.dist(x, bytes(len(x))))
        if a != b:
            y = _numbers(b, was["dtype"])
            far = math.hypot(far, math.dist(x, y))
            largest = max(largest, *map(abs, map(operator.sub, x, y)))
    return far, long, largest


def _numbers(data: bytes, dtype: str) -> array[float]:
    if dtype == "BF16":  # the upper half of a 32-bit number
        whole = bytearray(2 * len(data))
        whole[2::4], whole[3::4] = data[::2], data[1::2]
        data, dtype = bytes(whole), "F32"
    if dtype == "F16":
        return array("d", struct.unpack(f"<{len(data) // 2}e", data))
    numbers = array("f" if dtype == "F32" else "d", data)
    if struct.pack("=H", 1) != struct.pack("<H", 1):
        numbers.byteswap()
    return numbers
