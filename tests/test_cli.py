"""The command line: its options, what goes to stdout and stderr, and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from pipeline import __version__, merging
from pipeline.cli import OPTIONS, main
from pipeline.engine import status as status_module
from pipeline.errors import (
    BudgetError,
    CheckpointError,
    ConvergenceError,
    OutputError,
    PipelineError,
    Problem,
    RecipeError,
    StorageError,
    VerificationError,
    WorkerError,
)
from pipeline.methods import registry
from pipeline.storage import Store, open_store
from pipeline.units import format_bytes
from tests.planning.plans import SMALL_SHAPES, small_family
from tests.support.families import Family, load_folder, save_model

COMMANDS = ["batch", "calibrate", "clean", "merge", "methods", "plan", "schema", "status", "verify"]
LOCAL = ("--executor", "local")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def document(result: Result) -> Any:
    """The one JSON document that is all of stdout."""
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return small_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def merged(family: Family) -> Path:
    """A finished merge that no test may change."""
    output = family.root / "merged"
    assert run("merge", family.recipe(), output, *LOCAL).exit_code == 0
    return output


def test_the_options_are_frozen() -> None:
    found = {
        option
        for command in main.commands.values()
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    assert found == set(OPTIONS)
    assert set(OPTIONS) == {
        "--executor", "--address", "--workers", "--memory", "--device", "--overwrite", "--json", "--progress",
        "--older-than", "--dry-run", "--reuse", "--statistics", "--labels", "--task", "--examples", "--max-length",
        "--batch", "--reduction", "--seed", "--text-field", "--label-field", "--scratch",
    }  # fmt: skip
    assert sorted(main.commands) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_explains_itself_and_its_options(command: str, flag: str) -> None:
    result = run(command, flag)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert main.commands[command].help is not None
    for parameter in main.commands[command].params:
        if isinstance(parameter, click.Option):
            assert parameter.help
            assert parameter.opts[0] in result.stdout
        else:
            assert parameter.human_readable_name in result.stdout


def test_help_and_version() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.split("Commands:")[1].strip().splitlines()] == COMMANDS
    assert run("--version").stdout == f"geomerge, version {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("merge",),
        ("merge", "r", "o", "--nonsense"),
        ("merge", "r", "o", "--memory", "much"),
        ("merge", "r", "o", "--memory", "0"),
        ("plan", "r", "o", "--workers", "0"),
        ("plan", "r", "o", "--device", "tpu"),
        ("plan", "r", "o", "--overwrite"),
        ("merge", "r", "o", "--progress", "loud"),
        ("batch", "r"),
        ("clean", "u", "--older-than", "a while"),
        ("status",),
        ("unknown",),
    ],
)
def test_wrong_usage_is_told_on_stderr(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage:" in result.stderr


def test_methods_are_listed() -> None:
    found = document(run("methods", "--json"))
    assert set(found) == set(registry())
    assert found["geometric_median"]["parameters"]["weight"]["default"] == 1.0
    text = run("methods").stdout
    for name, entry in found.items():
        assert f"{name}\n    {entry['summary']}\n    {entry['reference']}\n" in text
        for parameter in entry["parameters"]:
            assert re.search(rf"^    {parameter} \(default ", text, re.MULTILINE)


def test_the_schema_accepts_our_recipes(family: Family) -> None:
    schema = document(run("schema"))
    assert document(run("schema", "--json")) == schema
    recipe = json.loads(family.recipe(name="schema.yaml", pipeline={"scope": "block"}).read_text())
    jsonschema.validate(recipe, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**recipe, "merge_methods": "linear"}, schema)


def test_a_plan_shows_what_a_merge_will_take_and_touches_nothing(family: Family) -> None:
    recipe = family.recipe(name="plan.yaml", pipeline={"bandwidth": "1KB"})
    output = family.root / "planned"
    found = document(run("plan", recipe, output, "--json", "--workers", 2, "--memory", "800MB"))
    assert not output.exists()
    assert (found["tensors"], found["workers"]) == (len(SMALL_SHAPES), 2)
    assert found["memory_per_worker"]["total"] <= 800_000_000
    assert found["seconds"] == {"measure": round(4 * 848 / 1000, 2), "write": round(3 * 848 / 1000, 2)}
    assert found["rates"].startswith("given")
    text = run("plan", recipe, output, "--memory", "800MB").stdout
    assert f"geometric_median of 3 models, scope model: {len(SMALL_SHAPES)} tensors, 212 elements, 7 chunks" in text
    for word in ("groups   1: model", "read     ", "memory   ", "time     ", "write 848 B in 1 file of 848 B\n"):
        assert word in text
    assert all(term in text for term in found["memory_per_worker"]["terms"])


def test_a_plan_opens_the_output_as_a_merge_does(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: dict[str, object] = {}

    def opening(url: str, options: Mapping[str, object] | None = None) -> Store:
        opened[url] = options
        return open_store(url)

    monkeypatch.setattr(merging, "open_store", opening)
    recipe = family.recipe(pipeline={"storage": {"memory://plan": {"region": "here"}}})
    assert run("plan", recipe, "memory://plan/out", *LOCAL).exit_code == 0
    assert opened["memory://plan/out"] == {"region": "here"}


def test_a_plan_measures_rates_when_none_is_given(family: Family) -> None:
    found = document(run("plan", family.recipe(name="rates.yaml"), family.root / "planned", "--json"))
    assert found["rates"].startswith("measured: ")
    # The start of this process says nothing once it is old.
    assert set(found["seconds"]) - {"start"} == {"measure", "write"}
    assert not (family.root / "planned").exists()


def test_a_merge_prints_a_table_and_leaves_a_checkpoint(family: Family) -> None:
    output = family.root / "table"
    result = run("merge", family.recipe(name="table.yaml", weights=[1, 2, 1]), output, *LOCAL)
    assert result.exit_code == 0
    assert "geometric_median of 3 models" in result.stdout
    last = result.stdout.splitlines()[-1]
    size = (output / "model-00001-of-00001.safetensors").stat().st_size
    certified = r": certified to a relative gap of \d\.\de[+-]\d\d; 1 group, 1 file, "
    took = f"{format_bytes(size)}; the run that committed it took 1 pass over the inputs, "
    assert re.match(re.escape(str(output)) + certified + took, last)
    assert set(load_folder(output)) == set(SMALL_SHAPES)


def test_a_second_merge_has_nothing_to_do(family: Family, merged: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in merged.rglob("*") if path.is_file()}
    first = document(run("merge", family.recipe(), merged, *LOCAL, "--json"))
    assert first == json.loads((merged / "geomerge_report.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in merged.rglob("*") if path.is_file()} == before


def test_status_of_a_finished_merge(merged: Path) -> None:
    found = document(run("status", merged, "--json"))
    assert (found["state"], found["files"], found["files_written"]) == ("committed", 1, 1)
    assert found["bytes"] == found["bytes_written"] == 848
    assert run("status", merged).stdout == (
        f"{merged}: committed; {found['files_measured']} measured and 1 written of 1 file, 848 B of 848 B\n"
    )


def test_verify_of_a_finished_merge(merged: Path) -> None:
    found = document(run("verify", merged, "--json"))
    size = (merged / "model-00001-of-00001.safetensors").stat().st_size
    assert found == {
        "output": str(merged),
        "files": 1,
        "tensors": len(SMALL_SHAPES),
        "bytes": size,
        "fingerprint": json.loads((merged / "geomerge_report.json").read_text())["fingerprint"],
    }
    assert run("verify", merged).stdout.endswith(": all as written\n")


def _bad_recipe(family: Family, root: Path) -> tuple[object, ...]:
    return "merge", family.recipe(name="bad.yaml", merge_methods="linear"), root / "o"


def _no_recipe(family: Family, root: Path) -> tuple[object, ...]:
    return "plan", root / "none.yaml", root / "o"


def _no_model(family: Family, root: Path) -> tuple[object, ...]:
    broken = Family(root=root, base=family.base, models=[*family.models, root / "none"])
    return "merge", broken.recipe(), root / "o"


def _little_memory(family: Family, root: Path) -> tuple[object, ...]:
    return "merge", family.recipe(), root / "o", "--memory", "1MB"


def _no_folder(family: Family, root: Path) -> tuple[object, ...]:
    (root / "file").write_text("")
    return "merge", family.recipe(), root / "file" / "o"


def _strict(family: Family, root: Path) -> tuple[object, ...]:
    return "merge", family.recipe(name="strict.yaml", pipeline={"tolerance": 1e-300}), root / "o"


def _damaged(family: Family, root: Path) -> tuple[object, ...]:
    assert run("merge", family.recipe(), root / "o", *LOCAL).exit_code == 0
    path = root / "o" / "model-00001-of-00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    return "verify", root / "o"


def _empty(family: Family, root: Path) -> tuple[object, ...]:
    return "verify", root


def _no_merge(family: Family, root: Path) -> tuple[object, ...]:
    return "status", root


def _occupied(family: Family, root: Path) -> tuple[object, ...]:
    (root / "o").mkdir()
    (root / "o" / "thesis.txt").write_text("mine")
    return "merge", family.recipe(), root / "o"


def _input(family: Family, root: Path) -> tuple[object, ...]:
    return "merge", family.recipe(), family.models[0] / "inside"


@pytest.mark.parametrize(
    ("prepared", "kind", "words"),
    [
        (_bad_recipe, RecipeError, "merge_methods"),
        (_no_recipe, RecipeError, "none.yaml"),
        (_no_model, CheckpointError, "none"),
        (_little_memory, BudgetError, "--memory "),
        (_no_folder, StorageError, "file"),
        (_strict, ConvergenceError, "relative gap"),
        (_damaged, VerificationError, "SHA-256"),
        (_empty, OutputError, "holds no merge"),
        (_no_merge, OutputError, "holds no merge"),
        (_occupied, OutputError, "--overwrite"),
        (_input, OutputError, "overlaps"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_an_error_is_one_text_on_stderr_and_its_exit_code(
    family: Family,
    tmp_path: Path,
    prepared: Callable[[Family, Path], tuple[object, ...]],
    kind: type[PipelineError],
    words: str,
    as_json: bool,
) -> None:
    arguments = prepared(family, tmp_path)
    result = run(*arguments, *(LOCAL if arguments[0] in ("merge", "plan") else ()), *(("--json",) if as_json else ()))
    assert result.exit_code == kind.exit_code
    assert result.stdout == ""
    assert result.stderr.count("error: ") == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "o" / "model.safetensors.index.json").exists() or prepared is _damaged


@pytest.mark.parametrize(
    "kind",
    [
        PipelineError,
        RecipeError,
        CheckpointError,
        BudgetError,
        StorageError,
        WorkerError,
        ConvergenceError,
        VerificationError,
        OutputError,
    ],
)
def test_every_class_of_errors_has_its_exit_code(monkeypatch: pytest.MonkeyPatch, kind: type[PipelineError]) -> None:
    problems = Problem(what="one", where="here", remedy="do"), Problem(what="two")

    def fail(_: object) -> dict[str, Any]:
        raise kind(*problems)

    monkeypatch.setattr(status_module, "status", fail)
    result = run("status", "/nowhere", "--json")
    assert result.exit_code == kind.exit_code
    assert result.stdout == ""
    assert result.stderr == "error: 2 problems:\n  - here: one (do)\n  - two\n"


def test_an_interruption_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(status_module, "status", interrupt)
    result = run("status", "/nowhere")
    assert result.exit_code == 130
    assert result.stdout == ""
    assert result.stderr == "stopped; the same command resumes\n"


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (MemoryError(), "error: the system refuses this process memory (a smaller --memory"),
        (RuntimeError("can't start new thread"), "error: the system refuses this process another thread (a higher"),
    ],
)
def test_what_the_system_refuses_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, words: str
) -> None:
    def fail(_: object) -> dict[str, Any]:
        raise raised

    monkeypatch.setattr(status_module, "status", fail)
    result = run("status", "/nowhere")
    assert (result.exit_code, result.stdout) == (WorkerError.exit_code, "")
    assert result.stderr.startswith(words)
    monkeypatch.setattr(status_module, "status", lambda _: [][1])
    assert isinstance(run("status", "/nowhere").exception, IndexError)


@pytest.mark.parametrize(("raised", "code"), [(15, 143), (143, 143), (3, 3), (None, 0)])
def test_an_exit_by_sigterm_is_told_from_others(monkeypatch: pytest.MonkeyPatch, raised: int | None, code: int) -> None:
    """Ray's own handler of SIGTERM exits with the signal's number."""

    def leave(_: object) -> dict[str, Any]:
        raise SystemExit(raised)

    monkeypatch.setattr(status_module, "status", leave)
    result = run("status", "/nowhere")
    assert result.exit_code == code
    assert result.stderr == ("stopped; the same command resumes\n" if code == 143 else "")


@pytest.mark.parametrize(
    ("options", "words"),
    [((), "the same command resumes"), (("--overwrite",), "the same command begins anew, and without --overwrite it")],
)
def test_a_stopped_merge_says_what_the_same_command_does(
    family: Family, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], words: str
) -> None:
    def stop(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        # What clearing up meets hides nothing.
        raise StorageError(Problem(what="cannot be cleared up"))

    monkeypatch.setattr(merging, "merge", stop)
    result = run("merge", family.recipe(), family.root / "out", *options)
    assert result.exit_code == 143
    assert result.stderr.startswith(f"stopped; {words}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("merge", "r", "--progress", "json"), "Missing argument 'OUTPUT'"),
        (("merge", "r", "o", "--progress=json", "--workers", "none"), "Invalid value for '--workers'"),
        (("batch", "r", "o", "--progress", "json", "--nonsense"), "No such option '--nonsense'"),
    ],
)
def test_with_lines_of_json_a_usage_error_is_one(arguments: tuple[str, ...], words: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = map(json.loads, result.stderr.splitlines())
    assert (line["event"], line["exit_code"]) == ("Error", 2)
    assert words in line["problems"][0]["what"]
    assert line["problems"][0]["remedy"].endswith(f"{arguments[0]} --help")


def test_help_is_help_with_lines_of_json_too() -> None:
    result = run("merge", "--progress", "json", "--help")
    assert result.exit_code == 0
    assert "--overwrite" in result.stdout
    assert result.stderr == ""


def test_overwrite_replaces_another_merge(family: Family, tmp_path: Path) -> None:
    output = tmp_path / "o"
    assert run("merge", family.recipe("linear", name="l.yaml"), output, *LOCAL).exit_code == 0
    average = load_folder(output)
    other = run("merge", family.recipe(), output, *LOCAL)
    assert other.exit_code == OutputError.exit_code
    assert "differs in the recipe" in other.stderr
    assert all(torch.equal(value, average[name]) for name, value in load_folder(output).items())
    assert run("merge", family.recipe(), output, *LOCAL, "--overwrite").exit_code == 0
    assert any(not torch.equal(value, average[name]) for name, value in load_folder(output).items())
    assert run("verify", output).exit_code == 0


def test_a_process_of_its_own_keeps_stdout_for_the_document(tmp_path: Path) -> None:
    family = small_family(tmp_path)
    for path in family.models[0].glob("tokenizer*"):
        path.unlink()
    for path in family.base.glob("tokenizer*"):
        path.unlink()
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "pipeline",
        "merge",
        str(family.recipe()),
        str(tmp_path / "o"),
        *LOCAL,
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env={**os.environ})
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "o" / "geomerge_report.json").read_text())
    lines = done.stderr.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    for word in ("has no tokenizer files", "solved model", "wrote model-00001-of-00001.safetensors", "committed"):
        assert sum(word in line for line in lines) == 1


def in_a_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line, with colours asked for as strongly as an environment can."""
    command = [sys.executable, "-m", "pipeline", *map(str, arguments), *LOCAL]
    environment = {**os.environ, "FORCE_COLOR": "1", "CLICOLOR_FORCE": "1", "TERM": "xterm-256color"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)


def test_progress_as_json_is_all_there_is_on_stderr(family: Family, tmp_path: Path) -> None:
    done = in_a_process("merge", family.recipe(name="json.yaml"), tmp_path / "o", "--progress", "json", "--json")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert all(list(line)[:2] == ["time", "event"] for line in lines)
    for name in ("PassStarted", "GroupSolved", "FileWritten", "PassEnded", "Committed"):
        assert sum(line["event"] == name for line in lines) == 1
    assert json.loads(done.stdout)["fingerprint"]
    refused = in_a_process("merge", family.recipe("linear", name="l.yaml"), tmp_path / "o", "--progress", "json")
    assert (refused.returncode, refused.stdout) == (OutputError.exit_code, "")
    last = json.loads(refused.stderr.splitlines()[-1])
    assert (last["event"], last["exit_code"]) == ("Error", OutputError.exit_code)
    assert set(last["problems"][0]) == {"what", "where", "remedy"}
    assert "differs in the recipe" in last["problems"][0]["what"]


@pytest.mark.parametrize("progress", ["auto", "lines"])
def test_the_log_of_a_job_is_plain(family: Family, tmp_path: Path, progress: str) -> None:
    done = in_a_process("merge", family.recipe(name="plain.yaml"), tmp_path / "o", "--progress", progress)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stderr
    assert "\r" not in done.stderr
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in done.stderr.splitlines())


def test_integers_between_the_floats_of_a_group_are_copied(tmp_path: Path) -> None:
    """Shards order them so; a group must still be solved from all of its tensors."""
    shapes = {"model.layers.0.a": (8, 8), "model.layers.0.z": (8, 8)}
    family = small_family(tmp_path, 4, shapes=shapes, shards=1, loud=3)
    ids = torch.arange(4, dtype=torch.int32)
    for folder in (family.base, *family.models):
        (folder / "model.safetensors").unlink()
        values = family.base_values if folder == family.base else family.values[family.models.index(folder)]
        # The second tensor is moved much further, so that half of the group has another median.
        ordered = {"model.layers.0.a": values["model.layers.0.a"], "model.layers.0.ids": ids}
        save_model(folder, {**ordered, "model.layers.0.z": values["model.layers.0.z"] ** 2}, shards=3)
    results = {}
    for distances in ("gram", "stream"):
        recipe = family.recipe(pipeline={"scope": "block", "distances": distances})
        assert run("merge", recipe, tmp_path / distances, *LOCAL).exit_code == 0
        results[distances] = load_folder(tmp_path / distances)
        assert torch.equal(results[distances]["model.layers.0.ids"], ids)
    for name in shapes:
        assert torch.allclose(results["gram"][name], results["stream"][name], atol=1e-6, rtol=0)


def test_verify_finds_a_value_that_is_not_finite(family: Family, tmp_path: Path) -> None:
    output = tmp_path / "o"
    assert run("merge", family.recipe(), output, *LOCAL).exit_code == 0
    path = output / "model-00001-of-00001.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][2] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    result = run("verify", output)
    assert result.exit_code == VerificationError.exit_code
    assert "SHA-256" in result.stderr or "bytes" in result.stderr
