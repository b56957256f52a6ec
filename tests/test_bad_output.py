"""Output folders that cannot be used, disks that fill up, and what a second run finds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.engine.verify import verify
from pipeline.errors import (
    BudgetError,
    CheckpointError,
    OutputError,
    PipelineError,
    RecipeError,
    StorageError,
    VerificationError,
)
from pipeline.events import Event, Note, PassStarted
from pipeline.merging import Resources, merge
from pipeline.storage import open_store

from .support.cases import INDEX, TINY, assert_nothing_committed, before_writing, edit_config, refused, tiny_family
from .support.families import load_folder

# The least that the free space check lets pass, and room for the tests' small models.
DISK_BYTES = 80 << 20


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file/out", "file/a/b", "file"])
def test_output_below_a_file(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    recipe, output = tiny_family(tmp_path).recipe(), tmp_path / place
    refused(recipe, output, StorageError, str(output), "cannot be written", "choose a folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_output_in_proc(tmp_path: Path) -> None:
    refused(tiny_family(tmp_path).recipe(), Path("/proc/geomerge"), StorageError, "/proc/geomerge", "choose a folder")


def test_read_only_output(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    output = tmp_path / "out"
    output.mkdir(mode=0o555)
    refused(tiny_family(tmp_path).recipe(), output, StorageError, str(output), "permissions")


def test_unknown_scheme(tmp_path: Path) -> None:
    recipe = tiny_family(tmp_path).recipe()
    with pytest.raises(StorageError, match=r"nosuch://bucket/out.*scheme"):
        merge(str(recipe), "nosuch://bucket/out")
    assert not Path("nosuch:").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", ["expert1", "base", "expert1/merged", "expert1/../expert1/", ".", "link", "link/sub"])
def test_output_is_or_holds_an_input(tmp_path: Path, place: str, overwrite: bool) -> None:
    family = tiny_family(tmp_path)
    recipe = family.recipe()
    (tmp_path / "link").symlink_to(family.models[1])
    before = files_of(tmp_path)
    named = str(family.base) if place in ("base", ".") else str(family.models[1])
    with pytest.raises(OutputError, match="choose another output folder") as caught:
        merge(str(recipe), f"{tmp_path}/{place}", overwrite=overwrite)
    assert named in str(caught.value)
    assert files_of(tmp_path) == before


def test_output_is_the_folder_that_a_linked_input_points_to(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    (tmp_path / "link").symlink_to(family.models[1])
    real, family.models[1] = family.models[1], tmp_path / "link"
    before = files_of(real)
    with pytest.raises(OutputError, match="link"):
        merge(str(family.recipe()), str(real), overwrite=True)
    assert files_of(real) == before


def test_foreign_folder(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    recipe, output = family.recipe(), tmp_path / "out"
    shutil.copytree(family.models[0], output)
    (output / "notes").mkdir()
    (output / "notes" / "other.safetensors").write_text("another model, in a folder of its own")
    before = files_of(output)
    with pytest.raises(OutputError, match=r"not empty.*--overwrite"):
        merge(str(recipe), str(output))
    assert files_of(output) == before
    merge(str(recipe), str(output), overwrite=True)
    assert not (output / "model.safetensors").exists(), "two models would lie in one folder"
    assert (output / "notes" / "other.safetensors").exists(), "only the folder itself is cleared"
    assert verify(open_store(str(output)))["tensors"] == len(TINY)


def test_empty_folder_and_leftover_parts(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / ".model-00001-of-00001.safetensors.99-0123456789abcdef.part").write_text("of a killed run")
    merge(str(tiny_family(tmp_path).recipe()), str(output))
    assert load_folder(output).keys() == set(TINY)


# --- a second run ------------------------------------------------------------------------------------------------


def test_second_run_of_the_same_recipe_does_nothing(tmp_path: Path) -> None:
    recipe, output = tiny_family(tmp_path).recipe(), tmp_path / "out"
    first = merge(str(recipe), str(output))
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    said: list[Event] = []
    assert merge(str(recipe), str(output), listener=said.append) == first
    assert any(isinstance(event, Note) and "already merged" in event.text for event in said)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before


def test_second_run_repairs_a_lost_file(tmp_path: Path) -> None:
    recipe, output = tiny_family(tmp_path).recipe(pipeline={"file_size": "200"}), tmp_path / "out"
    merge(str(recipe), str(output))
    before = load_folder(output)
    lost = sorted(output.glob("model-*.safetensors"))[1]
    lost.unlink()
    report = merge(str(recipe), str(output))
    after = load_folder(output)
    assert all(after[name].equal(before[name]) for name in TINY)
    assert report["resumed_files"] > 0
    assert verify(open_store(str(output)))["files"] == len(report["files"])


def test_overwrite_repairs_a_damaged_file(tmp_path: Path) -> None:
    recipe, output = tiny_family(tmp_path).recipe(), tmp_path / "out"
    merge(str(recipe), str(output))
    file = next(output.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(VerificationError, match="merge again"):
        verify(open_store(str(output)))
    merge(str(recipe), str(output), overwrite=True)
    assert verify(open_store(str(output)))["files"] == 1


def test_other_recipe_onto_the_same_folder(tmp_path: Path) -> None:
    family, output = tiny_family(tmp_path), tmp_path / "out"
    merge(str(family.recipe(pipeline={"file_size": "200"})), str(output))
    assert len(list(output.glob("*.safetensors"))) > 1
    before = files_of(output)
    other = family.recipe(pipeline={"file_size": "1GB"}, dtype="float16")
    with pytest.raises(OutputError, match=r"differs in the recipe.*--overwrite"):
        merge(str(other), str(output))
    assert files_of(output) == before
    merge(str(other), str(output), overwrite=True)
    assert [path.name for path in output.glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]
    assert set(json.loads((output / INDEX).read_text())["weight_map"].values()) == {"model-00001-of-00001.safetensors"}
    assert not list((output / "_geomerge" / "written").glob("*-of-00005*"))


def test_changed_source_is_not_the_same_merge(tmp_path: Path) -> None:
    family, output = tiny_family(tmp_path), tmp_path / "out"
    recipe = family.recipe()
    merge(str(recipe), str(output))
    shutil.copy(family.models[0] / "model.safetensors", family.models[1] / "model.safetensors")
    with pytest.raises(OutputError, match="differs in the models' files"):
        merge(str(recipe), str(output))


def test_failed_overwrite_of_other_inputs_keeps_the_old_result(tmp_path: Path) -> None:
    """What planning refuses is refused before anything of the old result is removed."""
    family, output = tiny_family(tmp_path), tmp_path / "out"
    merge(str(family.recipe()), str(output))
    before = files_of(output)
    edit_config(family.models[0], rope_theta=1.0)
    for kind, keys in ((CheckpointError, {}), (RecipeError, {"unknown": 1})):
        with pytest.raises(kind):
            merge(str(family.recipe(**keys)), str(output), overwrite=True)
    assert files_of(output) == before


@pytest.mark.parametrize("content", ['{"schema": 1, ', "[]", "\x00\x00"])
def test_damaged_plan(tmp_path: Path, content: str) -> None:
    recipe, output = tiny_family(tmp_path).recipe(), tmp_path / "out"
    merge(str(recipe), str(output))
    (output / "_geomerge" / "plan.json").write_text(content)
    with pytest.raises(VerificationError, match=r"plan\.json.*damaged.*--overwrite"):
        merge(str(recipe), str(output))
    merge(str(recipe), str(output), overwrite=True)
    assert verify(open_store(str(output)))["tensors"] == len(TINY)


# --- budgets and disks -------------------------------------------------------------------------------------------


def test_too_little_memory(tmp_path: Path) -> None:
    recipe, output = tiny_family(tmp_path).recipe(), tmp_path / "out"
    text = refused(recipe, output, BudgetError, "give at least --memory", resources=Resources(memory_bytes=1000))
    assert not output.exists()
    enough_mb = int(text.rpartition("--memory ")[2].partition("MB")[0])
    merge(str(recipe), str(output), resources=Resources(memory_bytes=enough_mb * 1_000_000))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of its own, just large enough for a merge to begin."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small filesystem can only be mounted by root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(place: Path, *, leave_bytes: int = 0) -> None:
    """Take the free space of a filesystem."""
    disk = os.statvfs(place)
    with (place / "filler").open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, disk.f_bavail * disk.f_frsize - leave_bytes)


def test_disk_is_full_before(tmp_path: Path, small_disk: Path) -> None:
    fill(small_disk, leave_bytes=1 << 20)
    output = small_disk / "out"
    refused(tiny_family(tmp_path).recipe(), output, BudgetError, str(output), "MB free", "free 6")
    assert not list(output.rglob("*.safetensors"))


def test_disk_fills_up_while_writing(tmp_path: Path, small_disk: Path) -> None:
    family = tiny_family(tmp_path)
    recipe, output = family.recipe(pipeline={"file_size": "200"}), small_disk / "out"
    listener = before_writing(lambda: fill(small_disk))
    refused(recipe, output, StorageError, str(output), "No space left", "disk is full", listener=listener)
    assert not [path for path in output.rglob("*") if path.name.endswith(".part")]
    (small_disk / "filler").unlink()
    said: list[Event] = []
    merge(str(recipe), str(output), listener=said.append)
    passes = [event.name for event in said if isinstance(event, PassStarted)]
    assert passes == ["write"], "what was measured before is not measured again"
    assert verify(open_store(str(output)))["tensors"] == len(TINY)


LIMITED = """
import resource, sys
from pipeline.merging import merge
from pipeline.errors import PipelineError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    merge(sys.argv[1], sys.argv[2])
except PipelineError as error:
    sys.stderr.write(str(error))
    sys.exit(error.exit_code)
"""


def test_limit_of_file_sizes(tmp_path: Path) -> None:
    family = tiny_family(tmp_path, shapes={"big.weight": (200, 200)})
    command = [sys.executable, "-c", LIMITED, str(family.recipe()), str(tmp_path / "out")]
    root = Path(__file__).parents[1]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=root)
    assert result.returncode == StorageError.exit_code, result.stderr
    assert "File too large" in result.stderr
    assert "file_size" in result.stderr
    assert_nothing_committed(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.part"))


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    family = tiny_family(tmp_path, shards=4)
    recipe = family.recipe()
    merge(str(recipe), str(tmp_path / "out"))
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for number in range(3):
        merge(str(recipe), str(tmp_path / f"out{number}"))
    assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208


def test_exit_codes_tell_our_errors_apart(tmp_path: Path) -> None:
    """Every exit code of ours is above 1: 1 is what Python gives an unexpected error."""
    codes = {kind.exit_code for kind in PipelineError.__subclasses__()}
    assert min(codes) > 1
    assert len(codes) == len(PipelineError.__subclasses__()), "one code per kind"
