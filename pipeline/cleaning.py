"""What killed runs leave below a URL and nothing shows: found, told, removed.

Owns what may go. An upload or a temporary file is left alone while it is young, and while the output folder that it
lies in is claimed by a run that lives. Of uploads, whose names say nothing of who began them, only those go that lie
in the output of a merge of ours: other programs use the same buckets.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pipeline.engine.claim import MISSED_INTERVALS, Run, moves, newest_run
from pipeline.engine.run_folder import FOLDER
from pipeline.errors import OutputError, Problem, StorageError
from pipeline.storage import Leftover, Store, is_path, open_store


def clean(url: str, *, older_than_s: float, dry_run: bool) -> dict[str, Any]:
    """Remove unfinished uploads and temporary files below a URL, and return what was found.

    Args:
        url: A folder or prefix: an output, or anything above one.
        older_than_s: Seconds; what began later stays, and what does not say when it began, unless this is 0.
        dry_run: Only look.

    Returns:
        `found`: one entry a leftover with `path`, `kind`, `bytes`, `age_seconds` and `done`, what became of it;
        `removed`: how many went, or would go; `bytes`: how much that is, as far as it is known.

    Raises:
        OutputError: The URL lies inside a run folder, so that its claim is not seen.
        StorageError: There is no such folder, or the store failed.
    """
    with closing(open_store(url)) as store:
        if FOLDER in store.url.split("/"):
            raise OutputError(
                Problem(
                    what=f"lies inside the run folder {FOLDER}/ of an output",
                    where=store.location(),
                    remedy="name the output folder, or one above it",
                )
            )
        if store.is_local and not Path(store.url).is_dir():
            raise StorageError(Problem(what="there is no such folder", where=store.location(), remedy="check the path"))
        now, outputs = time.time(), _Outputs(store)
        found, removed_bytes = [], 0
        for leftover in sorted(store.leftovers(), key=lambda item: (item.path, item.handle)):
            age_s = None if leftover.started_s is None else max(0.0, now - leftover.started_s)
            reason = _too_young(age_s, older_than_s) or outputs.reason(leftover)
            if not reason:
                removed_bytes += leftover.size_bytes or 0
                if not dry_run:
                    store.remove_leftover(leftover)
            found.append({
                "path": leftover.path,
                "kind": leftover.kind,
                "bytes": leftover.size_bytes,
                "age_seconds": None if age_s is None else round(age_s, 1),
                "done": reason or ("would be removed" if dry_run else "removed"),
            })  # fmt: skip
        return {
            "url": store.location(),
            "older_than_seconds": older_than_s,
            "dry_run": dry_run,
            "found": found,
            "removed": sum(entry["done"] in ("removed", "would be removed") for entry in found),
            "bytes": removed_bytes,
        }


def _too_young(age_s: float | None, older_than_s: float) -> str:
    if age_s is None:
        return "kept: its age is not known" if older_than_s > 0 else ""
    return "kept: too young" if age_s < older_than_s else ""


class _Outputs:
    """Which folders are outputs of ours, and which have a run that lives; every one is looked at once.

    Args:
        store: What is cleaned; the folder itself and those in it count.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: dict[str, tuple[bool, str]] = {}

    def reason(self, leftover: Leftover) -> str:
        """Return why a leftover must stay, or nothing."""
        if not is_path(leftover.path):
            return "kept: no merge of ours writes to such a name"
        seen = [self._look(folder) for folder in _folders(leftover.path)]
        claimed = next((reason for _, reason in seen if reason), "")
        # A merge writes its run file and its plan before its first upload.
        if not claimed and leftover.kind == "upload" and not any(ours for ours, _ in seen):
            return "kept: no merge of ours here"
        return claimed

    def _look(self, folder: str) -> tuple[bool, str]:
        """Return whether a folder holds a merge of ours, and why it must be left alone, or nothing."""
        if folder not in self._seen:
            output = _Folder(store=self._store, name=folder)
            paths = output.list(FOLDER)
            run = newest_run(cast(Store, output), paths)
            self._seen[folder] = (bool(paths), "" if run is None else _living(output, run))
        return self._seen[folder]


def _folders(path: str) -> Iterator[str]:
    """Yield the folders that a path lies in, the nearest first; what is inside of a run folder is no output."""
    parts = path.split("/")[:-1]
    for length in range(len(parts), -1, -1):
        if FOLDER not in parts[:length]:
            yield "/".join(parts[:length])


def _living(output: _Folder, run: Run) -> str:
    lives = run.lives_here()
    if lives is None:
        # Another machine's: seen to live by its sign of life, as a merge would.
        lives = moves(cast(Store, output), run, seconds=MISSED_INTERVALS * run.interval_s)
    return f"kept: {run.who} is at it" if lives else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Folder:
    """A folder of the store that is cleaned: as much of a store as looking at run files takes.

    Not a store of its own: a key of other programs may be no URL that can be opened.
    """

    store: Store
    name: str

    def list(self, prefix: str) -> tuple[str, ...]:
        """See `Store`."""
        above = f"{self.name}/" if self.name else ""
        return tuple(path.removeprefix(above) for path in self.store.list(above + prefix))

    def read(self, path: str) -> bytes:
        """See `Store`."""
        return self.store.read(f"{self.name}/{path}" if self.name else path)
