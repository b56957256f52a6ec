"""Reading a finished output again: headers, checksums, finiteness, names.

Owns what `geomerge verify` checks. Needs only the output folder: the report and the plan in it say what must be there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pipeline.checkpoints.checkpoint import open_checkpoint
from pipeline.checkpoints.header import TensorEntry, read_header
from pipeline.engine.output import is_committed, missing_side_files
from pipeline.engine.run_folder import PLAN, REPORT, read_json
from pipeline.errors import OutputError, PipelineError, Problem, VerificationError
from pipeline.numerics.dtypes import array_dtype, is_mergeable
from pipeline.numerics.kernels import non_finite_counts
from pipeline.storage import Store
from pipeline.storage.options import NO_OPTIONS, StorageOptions

# Bytes read at a time: long enough for speed, whole elements of every dtype.
_PIECE_BYTES = 8 << 20


def verify(output: Store) -> dict[str, Any]:
    """Check a committed output against its own report and plan.

    Args:
        output: The folder.

    Returns:
        What was checked: files, tensors, bytes.

    Raises:
        OutputError: There is no committed merge here.
        VerificationError: Everything that is not as it must be.
    """
    report, plan, paths = read_json(output, REPORT), read_json(output, PLAN), output.list()
    if report is None or plan is None or not is_committed(paths, plan):
        state = "an unfinished merge" if plan is not None else "no merge"
        raise OutputError(
            Problem(
                what=f"holds {state}",
                where=f"output {output.location()}",
                remedy="run the merge again: it resumes" if plan is not None else "name the folder of a finished merge",
            )
        )
    problems: list[Problem] = []
    try:
        # The index, every shard's header and their agreement, by the same code that reads inputs.
        checkpoint = open_checkpoint(output.url, _options(plan).of(output.url))
    except PipelineError as error:
        raise VerificationError(*error.problems) from error
    problems += _name_problems(plan, checkpoint.tensors)
    problems += [
        Problem(what="is gone", where=f"file {output.location(path)}", remedy="run the merge again: it writes it anew")
        for path in missing_side_files(output, paths)
    ]
    for entry in report["files"]:
        problems += _file_problems(output, entry)
    if problems:
        raise VerificationError(*problems)
    return {
        "output": output.location(),
        "files": len(report["files"]),
        "tensors": len(checkpoint.tensors),
        "bytes": sum(entry["bytes"] for entry in report["files"]),
        "fingerprint": report["fingerprint"],
    }


def _options(plan: Mapping[str, Any]) -> StorageOptions:
    """Return how stores are opened, as the plan's recipe says."""
    found = (plan["recipe"].get("pipeline") or {}).get("storage")
    return StorageOptions(found) if found else NO_OPTIONS


def _name_problems(plan: Mapping[str, Any], found: Mapping[str, TensorEntry]) -> Iterator[Problem]:
    """Yield tensors that are missing, extra, or of another shape or dtype than planned from the base."""
    wanted = {
        stored["name"]: (list(stored["shape"]), tensor["dtype"])
        for tensor in plan["tensors"]
        for stored in tensor.get("stored") or (tensor,)
    }
    for name, (shape, dtype) in wanted.items():
        entry = found.get(name)
        if entry is None:
            yield Problem(what="is missing", where=f"tensor {name}")
        elif list(entry.shape) != shape or entry.dtype != dtype:
            yield Problem(
                what=f"is {entry.dtype} {list(entry.shape)}, but was planned as {dtype} {shape}",
                where=f"tensor {name}",
            )
    for name in found:
        if name not in wanted:
            yield Problem(what="was never planned", where=f"tensor {name}")


def _file_problems(output: Store, entry: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with one file's bytes: size, checksum, values that are not finite."""
    name = entry["name"]
    where = f"file {output.location(name)}"
    stat = output.stat(name)
    if stat.size_bytes != entry["bytes"]:
        yield Problem(what=f"has {stat.size_bytes} bytes, but {entry['bytes']} were written", where=where)
        return
    digest = hashlib.sha256()
    for piece in _pieces(output, name, 0, stat.size_bytes):
        digest.update(piece)
    if digest.hexdigest() != entry["sha256"]:
        yield Problem(
            what=f"SHA-256 is {digest.hexdigest()}, but {entry['sha256']} was written",
            where=where,
            remedy="the file was damaged or changed after the merge; merge again with --overwrite",
        )
    for tensor in read_header(output, name).tensors:
        if is_mergeable(tensor.dtype):
            count = _non_finite(output, tensor)
            if count:
                yield Problem(what=f"{count} values are NaN or infinite", where=f"{where}, tensor {tensor.name}")


def _non_finite(output: Store, tensor: TensorEntry) -> int:
    """Return how many elements of a tensor are not finite."""
    count = 0
    for piece in _pieces(output, tensor.file, tensor.start, tensor.stop):
        count += non_finite_counts([np.frombuffer(piece, dtype=array_dtype(tensor.dtype))])[0]
    return count


def _pieces(output: Store, path: str, start: int, stop: int) -> Iterator[bytes]:
    for position in range(start, stop, _PIECE_BYTES):
        yield output.read(path, position, min(position + _PIECE_BYTES, stop))
