"""`geomerge calibrate` as it is called."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import transformers
from click.testing import CliRunner, Result

from pipeline.checkpoints.statistics import open_statistics
from pipeline.cli import main
from pipeline.errors import CalibrationError, OutputError
from tests.calibration import models
from tests.calibration.runs import raw_values

WORDS = ["[PAD]", "[UNK]", *["the", "a", "good", "bad", "film", "plot", "was", "is", "not", "very"]]
ROWS = [
    {"review": "the film was good", "sentiment": "yes"},
    {"review": "a very bad plot", "sentiment": "no"},
    {"review": "the plot was not good", "sentiment": "no"},
]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["calibrate", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with a tokenizer of words."""
    folder = models.bert(tmp_path_factory.mktemp("words") / "model", layers=1)
    words = tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def options(model: Path, tmp_path: Path) -> list[object]:
    data = models.save_rows(tmp_path / "data.jsonl", ROWS)
    fields = ["--text-field", "review", "--label-field", "sentiment"]
    return [model, data, tmp_path / "out", "--statistics", "fisher", *fields, "--device", "cpu"]


def test_it_collects_tells_and_does_nothing_twice(
    options: list[object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = run(*options, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["output"] == str(tmp_path / "out")
    assert (document["mode"], document["facts"]["examples"], document["facts"]["tokens"]) == ("whole", 3, 13)
    assert document["facts"]["extra"]["task"] == "classification"
    assert document["stored"] == len(open_statistics(str(tmp_path / "out")).entries)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = run(*options)
    assert again.exit_code == 0
    assert "nothing to do" in caplog.text
    assert "fisher statistics of 3 examples, 13 tokens" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_other_statistics_do_not_go_into_the_same_folder(options: list[object]) -> None:
    assert run(*options).exit_code == 0
    result = run(*options, "--labels", "exact")
    assert result.exit_code == OutputError.exit_code
    assert "holds finished statistics of something else: labels is 'empirical' there, 'exact' here" in result.stderr


def test_a_table_gives_what_its_lines_give(model: Path, options: list[object], tmp_path: Path) -> None:
    assert run(*options).exit_code == 0
    table = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), table)
    other = [model, table, tmp_path / "other", *options[3:]]
    assert run(*other).exit_code == 0
    found = [raw_values(open_statistics(str(tmp_path / name))) for name in ("out", "other")]
    assert found[0] == found[1]


def test_it_reads_and_writes_object_storage(model: Path, options: list[object], s3_url: str, tmp_path: Path) -> None:
    from pipeline.storage import open_store

    store = open_store(f"{s3_url}/calibration")
    for path in model.iterdir():
        store.write(f"model/{path.name}", path.read_bytes())
    store.write("data.jsonl", Path(str(options[1])).read_bytes())
    urls = [f"{s3_url}/calibration/{name}" for name in ("model", "data.jsonl", "out")]
    result = run(*urls, *options[3:])
    assert result.exit_code == 0, result.output
    assert run(*options).exit_code == 0
    assert raw_values(open_statistics(urls[2])) == raw_values(open_statistics(str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--label-field", "label"], "has no field 'label'"),
        (["--task", "seq2seq"], "class for the task seq2seq"),
        (["--statistics", "gram", "--labels", "exact"], "no gradient is taken"),
    ],
)
@pytest.mark.parametrize("form", ["lines", "json"])
def test_an_error_is_one_text_and_an_exit_code(options: list[object], more: list[str], words: str, form: str) -> None:
    result = run(*options, *more, "--progress", form)
    assert result.exit_code == CalibrationError.exit_code
    assert result.stdout == ""
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_progress_for_programs(options: list[object]) -> None:
    result = run(*options, "--progress", "json")
    events = [json.loads(line) for line in result.stderr.splitlines()]
    ended: list[dict[str, Any]] = [event for event in events if event["event"] == "StageEnded"]
    assert [(event["stage"], event["number"], event["stages"]) for event in ended] == [("pass 1", 1, 1)]
    assert events[-1]["event"] == "Committed"


def test_progress_on_a_terminal(options: list[object]) -> None:
    result = run(*options, "--progress", "bar")
    assert result.exit_code == 0
    assert "saved the statistics of pass 1 (1 of 1)" in result.stderr


def test_a_classifier_without_padding_takes_one_text_at_a_time(
    model: Path, options: list[object], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    result = run(folder, *options[1:3], "--statistics", "gram", *options[5:])
    assert result.exit_code == CalibrationError.exit_code
    assert "set it, or --batch 1" in result.stderr
    assert run(folder, *options[1:3], "--statistics", "gram", *options[5:], "--batch", 1).exit_code == 0


def test_without_transformers_it_says_what_to_install(options: list[object]) -> None:
    program = "import sys; sys.modules['transformers'] = None; from pipeline.cli import main; main()"
    command = [sys.executable, "-c", program, "calibrate", *map(str, options)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert ran.returncode == CalibrationError.exit_code
    assert "pip install 'geomerge[calibrate]'" in ran.stderr


def test_the_command_line_loads_neither_torch_nor_transformers() -> None:
    program = "import sys, pipeline.cli; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=True)
    assert ran.stdout.strip() == "set()"
