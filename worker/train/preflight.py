"""Reads what training would read, and trains nothing: `python -m worker.train.preflight SPEC OUT`.

Rows go through the trainer's own `RowReader`, so what is shown cannot differ from what is trained. Writes
`OUT/preflight.json`; exit codes and `OUT/events.jsonl` are the trainer's. Rows are never held: each process reads its
stretches of the file and keeps a few numbers a row.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import psutil

from shared.contract.events import (
    EXIT_DONE,
    EXIT_OUT_OF_MEMORY,
    EXIT_USER_FAULT,
    PREVIEW_TOKENS,
    SHOWN,
    Bin,
    Failed,
    FileTokens,
    Leakage,
    RowFault,
    RowPreview,
    Rows,
    ShownSequence,
    Span,
    TemplateAbilities,
    Token,
    TokenReport,
    UnwrittenRows,
)
from shared.contract.spec import PreflightSpec
from shared.errors import Invalid, TunepoolError
from worker.train.data import AnswersRow, Row, RowReader
from worker.train.reporting import Reporter
from worker.train.row_count import RowCount
from worker.train.template_abilities import abilities
from worker.train.token_spans import Ids, Mask
from worker.train.unwritten import PromptLosses, message_of
from worker.train.written_parts import written_parts

STRETCH_BYTES: Final = 1 << 20
NO_PROMPT: Final = 0  # the digest of a row whose trained text has nothing before it
NOTHING: Final = (0, 0, 0, 0, NO_PROMPT)  # the numbers of a row that cannot be read

Numbers = npt.NDArray[np.int64]
Digests = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class LineRange:
    """Whole lines of a file: bytes `start` to `end`; its first row is `first_row`, counted from 1."""

    file: Path
    start: int
    end: int
    first_row: int


@dataclass(frozen=True)
class TokenCounts:
    """What is kept of some rows, in order: one number per row each."""

    tokens: Numbers
    kept: Numbers  # after the cut; 0: left out
    trained: Numbers
    digests: Digests
    prompts: Digests
    faults: list[RowFault]
    fault_count: int
    unwritten: list[UnwrittenRows]


def main(spec_file: Path, out: Path) -> int:
    """Run one preflight and translate how it ends into an exit code."""
    out.mkdir(parents=True, exist_ok=True)
    reporter = Reporter(out / "events.jsonl", clock=time.time)
    try:
        spec = PreflightSpec.model_validate_json(spec_file.read_bytes())
        report = examine(spec, RowCount(out).add)
    except TunepoolError as error:
        reporter.write(Failed, code=error.code, message=error.message, param=error.param)
        return EXIT_USER_FAULT
    except (MemoryError, BrokenProcessPool):
        reporter.write(Failed, code="host_oom", message="The rows or the chat template ask for too much memory.")
        return EXIT_OUT_OF_MEMORY
    unfinished = out / "preflight.json.part"
    unfinished.write_text(report.model_dump_json(), encoding="utf-8")
    unfinished.rename(out / "preflight.json")
    return EXIT_DONE


def examine(spec: PreflightSpec, read: Callable[[int], object] = lambda rows: None) -> TokenReport:
    """Read both files of a job as its trainer would. `read` hears of rows that are done.

    Raises Invalid when no row can be read at all.
    """
    # Not at the top: the program does without PyTorch, and has to say so before transformers is imported.
    from worker.train.tokenizer import generation_ends, load_tokenizer

    tokenizer = load_tokenizer(spec)
    ends = generation_ends(tokenizer, Path(spec.base_model_path))
    reader = RowReader(tokenizer, facts=spec.job.data, training=spec.job.training, ends=ends)
    train_file = Path(spec.train_file)
    with workers(reader, tokenizer, spec=spec) as pool:
        shown = pool.submit(previews, train_file, spec.preview_rows)
        able = None if reader.template is None else pool.submit(template_abilities, ends)
        training = count(train_file, pool, read)
        validation = None if spec.validation_file is None else count(Path(spec.validation_file), pool, read)
    return TokenReport(
        training=describe(training, max_length=spec.job.training.max_length),
        validation=None if validation is None else describe(validation, max_length=spec.job.training.max_length),
        leakage=None if validation is None else leakage(training, validation),
        preview=shown.result(),
        template=None if able is None else able.result(),
    )


# ---- Reading, in several processes


class _Inherited:
    """What a forked process has from its parent: a tokenizer cannot travel, so it is there before the fork."""

    reader: RowReader
    decode: Callable[..., str]


def workers(reader: RowReader, tokenizer: Any, *, spec: PreflightSpec) -> ProcessPoolExecutor:
    """The processes that render templates. Forked: tokenizer and libraries weigh 150 MB, which they share."""
    _Inherited.reader, _Inherited.decode = reader, tokenizer.decode
    fork = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(
        spec.processes, mp_context=fork, initializer=_limit_memory, initargs=(spec.memory_bytes,)
    )


def _limit_memory(gain: int) -> None:
    """Let this process gain `gain` bytes, so that a template's bomb ends in an error here and not the host."""
    ceiling = psutil.Process().memory_full_info().data + gain
    resource.setrlimit(resource.RLIMIT_DATA, (ceiling, ceiling))


def count(file: Path, pool: Executor, read: Callable[[int], object]) -> TokenCounts:
    """Read every row of `file`."""
    waiting: list[Future[TokenCounts]] = [pool.submit(count_stretch, stretch) for stretch in stretches(file)]
    parts = []
    for future in waiting:
        parts.append(future.result())
        read(len(parts[-1].tokens))
    return TokenCounts(
        tokens=_joined([part.tokens for part in parts], np.int64),
        kept=_joined([part.kept for part in parts], np.int64),
        trained=_joined([part.trained for part in parts], np.int64),
        digests=_joined([part.digests for part in parts], np.uint64),
        prompts=_joined([part.prompts for part in parts], np.uint64),
        faults=[fault for part in parts for fault in part.faults][:SHOWN],
        fault_count=sum(part.fault_count for part in parts),
        unwritten=_unwritten(part.unwritten for part in parts),
    )


def _unwritten(parts: Iterable[list[UnwrittenRows]]) -> list[UnwrittenRows]:
    whole = PromptLosses()
    for part in parts:
        whole.extend(part)
    return whole.entries()


def _joined(arrays: list[npt.NDArray[Any]], dtype: type) -> npt.NDArray[Any]:
    return np.concatenate([*arrays, np.empty(0, dtype=dtype)])


def stretches(file: Path, *, size: int = STRETCH_BYTES) -> Iterator[LineRange]:
    """Cut a file of canonical rows at line ends, about every `size` bytes."""
    start, row = 0, 1
    with file.open("rb") as stream:
        while block := stream.read(size):
            block += stream.readline()
            yield LineRange(file, start, start + len(block), first_row=row)
            start, row = start + len(block), row + block.count(b"\n")


def records(stretch: LineRange) -> Iterator[dict[str, Any]]:
    """The rows of a stretch. Canonical files have no blank lines."""
    with stretch.file.open("rb") as stream:
        stream.seek(stretch.start)
        while stream.tell() < stretch.end:
            yield json.loads(stream.readline())


def count_stretch(stretch: LineRange) -> TokenCounts:
    """Read some rows; those that the trainer would refuse are named and counted as left out."""
    numbers: list[tuple[int, int, int, int, int]] = []
    faults: list[RowFault] = []
    fault_count = 0
    unwritten = PromptLosses()
    for number, taken in enumerate(_Inherited.reader.take(records(stretch)), start=stretch.first_row):
        if not isinstance(taken, Invalid):
            numbers.append(_numbers(taken.whole, taken.kept))
            unwritten.add(number, taken.lost)
            continue
        fault_count += 1
        numbers.append(NOTHING)
        if len(faults) < SHOWN:
            faults.append(RowFault(row=number, code=taken.code, message=taken.message))
    columns = list(zip(*numbers, strict=True)) or [()] * 5
    tokens, kept, trained = (np.asarray(column, dtype=np.int64) for column in columns[:3])
    digests, prompts = (np.asarray(column, dtype=np.uint64) for column in columns[3:])
    return TokenCounts(tokens, kept, trained, digests, prompts, faults, fault_count, unwritten.entries())


def _numbers(whole: Row | None, kept: Row | None) -> tuple[int, int, int, int, int]:
    if whole is None:
        return NOTHING
    if isinstance(whole, AnswersRow):
        prompt = np.asarray(whole.prompt_ids, dtype=np.int32)
        content = json.dumps([whole.prompt_ids, whole.answers, whole.label]).encode()
    else:
        prompt, content = prompt_of(whole.ids, whole.labelled), whole.ids.tobytes()
    return (
        whole.tokens,
        kept.tokens if kept else 0,
        kept.labelled_tokens if kept else 0,
        _digest(content),
        _digest(prompt.tobytes()) if len(prompt) else NO_PROMPT,
    )


def prompt_of(ids: Ids, labelled: Mask) -> Ids:
    """The tokens before the last trained span; none for a row that is trained whole."""
    trained = np.flatnonzero(labelled)
    if not len(trained):
        return ids[:0]
    context = np.flatnonzero(~labelled[: trained[-1]])
    # The first token of a row is never labelled, so a text row's only "context" is that one.
    return ids[: context[-1] + 1] if len(context) and context[-1] > 0 else ids[:0]


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


# ---- Describing


def describe(counted: TokenCounts, *, max_length: int) -> FileTokens:
    """Totals, spread and findings of one file."""
    tokens = counted.tokens
    longest = int(tokens.argmax()) if len(tokens) else 0
    empty = counted.kept == 0
    return FileTokens(
        rows=len(tokens),
        tokens=int(tokens.sum()),
        kept_tokens=int(counted.kept.sum()),
        trained_tokens=int(counted.trained.sum()),
        mean_tokens=round(float(tokens.mean()), 1),
        median_tokens=float(np.median(tokens)),
        p95_tokens=float(np.percentile(tokens, 95)),
        longest_row=longest + 1,
        longest_tokens=int(tokens[longest]),
        histogram=histogram(tokens),
        truncated=_rows((counted.kept < tokens) & ~empty),
        empty=_rows(empty),
        duplicates=_rows(repeats(counted.digests) & (tokens > 0)),
        fault_count=counted.fault_count,
        faults=counted.faults,
        unwritten=counted.unwritten,
    )


def histogram(tokens: Numbers) -> list[Bin]:
    """Rows by length, in bins that double: at most 16, 32, 64 … tokens."""
    edges = [16]
    while edges[-1] < tokens.max():
        edges.append(2 * edges[-1])
    rows = np.bincount(np.searchsorted(edges, tokens), minlength=len(edges))
    first = int(np.flatnonzero(rows)[0])
    return [Bin(up_to=edges[place], rows=int(rows[place])) for place in range(first, len(edges))]


def repeats(digests: Digests) -> Mask:
    """Which entries equal an earlier one."""
    _, first = np.unique(digests, return_index=True)
    repeated = np.ones(len(digests), dtype=np.bool_)
    repeated[first] = False
    return repeated


def leakage(training: TokenCounts, validation: TokenCounts) -> Leakage:
    """Validation rows that training has seen, whole or by their prompt."""
    same_prompt = np.isin(validation.prompts, training.prompts) & (validation.prompts != NO_PROMPT)
    same_row = np.isin(validation.digests, training.digests) & (validation.tokens > 0)
    return Leakage(rows=_rows(same_row), prompts=_rows(same_prompt))


def _rows(mask: Mask) -> Rows:
    places = np.flatnonzero(mask)
    return Rows(count=len(places), rows=[int(place) + 1 for place in places[:SHOWN]])


# ---- Showing


def template_abilities(stops: Sequence[str]) -> TemplateAbilities | None:
    """Asked in a process of the pool, where a template's bomb ends in an error; None for a template that is one."""
    template = _Inherited.reader.template
    assert template is not None
    try:
        return abilities(template, stops=stops)
    except Invalid:  # too slow or too large: each row says so
        return None


def previews(file: Path, wanted: Sequence[int]) -> list[RowPreview]:
    """The wanted rows, token by token; numbers beyond the file's end are passed over."""
    left = sorted(set(wanted))
    shown: list[RowPreview] = []
    for stretch in stretches(file):
        for number, record in enumerate(records(stretch), start=stretch.first_row):
            if not left:
                return shown
            if number == left[0]:
                left.pop(0)
                shown.append(preview(number, record))
    return shown


def preview(number: int, record: dict[str, Any]) -> RowPreview:
    """One row as it is trained."""
    fault = "No token of this row carries loss, or max_length cuts it before its answer: it is left out."
    (taken,) = _Inherited.reader.take([record])
    if isinstance(taken, Invalid):
        written = written_parts(record, [])
        return RowPreview(row=number, truncated=False, sequences=[], fault=taken.message, written=written)
    row, lost, written = taken.kept, [message_of(loss) for loss in taken.lost], written_parts(record, taken.lost)
    if row is None:
        return RowPreview(row=number, truncated=False, sequences=[], fault=fault, unwritten=lost, written=written)
    shown = [_sequence(name, ids, trained) for name, ids, trained in sequences(row, kto="label" in record)]
    return RowPreview(row=number, truncated=row is not taken.whole, sequences=shown, unwritten=lost, written=written)


def sequences(row: Row, *, kto: bool) -> Iterator[tuple[Any, Ids, Mask]]:
    """(name, ids, mask of the trained ones) of each sequence that the row makes."""
    if not isinstance(row, AnswersRow):
        yield "row", row.ids, row.labelled
        return
    for name, answer in zip(("completion",) if kto else ("chosen", "rejected"), row.answers, strict=True):
        ids = np.asarray(row.prompt_ids + answer, dtype=np.int32)
        yield name, ids, np.arange(len(ids)) >= len(row.prompt_ids)


def _sequence(name: Any, ids: Ids, trained: Mask) -> ShownSequence:
    decode = _Inherited.decode
    shown = zip(ids[:PREVIEW_TOKENS].tolist(), trained[:PREVIEW_TOKENS].tolist(), strict=True)
    edges = np.flatnonzero(np.diff(trained.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    return ShownSequence(
        name=name,
        text=decode(ids),
        token_count=len(ids),
        trained_token_count=int(trained.sum()),
        tokens=[Token(id=token_id, text=decode([token_id]), trained=carries_loss) for token_id, carries_loss in shown],
        spans=[Span(start=start, end=end, text=decode(ids[start:end])) for start, end in edges.tolist()],
    )


if __name__ == "__main__":
    # To transformers this is a machine without PyTorch, where it offers tokenizers and templates: the same ones, in a
    # third of the time to start and of the memory.
    sys.modules["torch"] = None  # type: ignore[assignment]  # documented: the import of this module fails
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
