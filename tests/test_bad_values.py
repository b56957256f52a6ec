"""Values that cannot be merged, and sources that change while they are merged: named, and nothing committed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.errors import CheckpointError, VerificationError
from pipeline.merging import merge

from .support.cases import (
    HEAD,
    MLP,
    TINY,
    before_writing,
    data_start,
    edit,
    flip_bit,
    refused,
    tiny_family,
    without_retention,
)
from .support.families import Family, load_folder

# --- values that are not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["geometric_median", "linear"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_non_finite_expert(tmp_path: Path, method: str, dtype: torch.dtype, value: float) -> None:
    family = tiny_family(tmp_path, dtype=dtype)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[MLP] = tensors[MLP].to(torch.float32).index_fill(0, torch.tensor([1]), value).to(dtype)

    edit(family.models[1], spoil)
    count = "4 of the values 0 to 16" if method == "linear" else "4 of 16 values"
    recipe = family.recipe(method, base=method != "linear")
    text = refused(recipe, tmp_path / "out", CheckpointError, str(family.models[1]), MLP, count)
    assert ("non_finite: base" in text) == (method != "linear"), "without a base there is nothing to take instead"


def test_non_finite_single_model(tmp_path: Path) -> None:
    family = tiny_family(tmp_path, 1)
    edit(family.models[0], lambda tensors: tensors[MLP].fill_(float("nan")))
    recipe = family.recipe(base=False)
    refused(recipe, tmp_path / "out", CheckpointError, str(family.models[0]), MLP, "NaN")


def test_non_finite_base_cannot_replace_itself(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    edit(family.base, lambda tensors: tensors[MLP].fill_(float("inf")))
    recipe = family.recipe(pipeline={"non_finite": "base"})
    text = refused(recipe, tmp_path / "out", CheckpointError, str(family.base), MLP, "16 of 16", "repair the base")
    assert str(family.models[0]) not in text


def test_cast_that_overflows_is_named(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    edit(family.models[1], lambda tensors: tensors[MLP].fill_(1e6))
    words = (str(family.models[1]), MLP, "16 of 16", "in float16, the recipe's dtype")
    refused(family.recipe(dtype="float16"), tmp_path / "out", CheckpointError, *words)


def test_every_bad_tensor_of_a_file_is_reported(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    edit(family.models[0], lambda tensors: tensors[MLP].fill_(float("nan")))
    edit(family.models[2], lambda tensors: tensors[HEAD].fill_(float("nan")))
    words = (f"model {family.models[0]}, tensor {MLP}", f"model {family.models[2]}, tensor {HEAD}", "32 of 32")
    refused(family.recipe(), tmp_path / "out", CheckpointError, "2 problems", *words)


def test_distances_beyond_float64(tmp_path: Path) -> None:
    family = tiny_family(tmp_path, dtype=torch.float64)
    edit(family.models[1], lambda tensors: tensors[MLP].fill_(1e200))
    refused(family.recipe(), tmp_path / "out", VerificationError, MLP, "overflows float64", "1e150")


# --- sources that change between the two reads -------------------------------------------------------------------


def change_between_reads(family: Family, output: Path, action: Callable[[], object], *words: str) -> None:
    """Merge several files that nothing of is kept, act after the measuring read, and expect the file to be named."""
    recipe = family.recipe(pipeline={"file_size": "200"})
    resources = without_retention(recipe, output)
    kind = VerificationError if "first read" in words else CheckpointError
    refused(recipe, output, kind, *words, listener=before_writing(action), resources=resources)
    assert not list(output.glob("*.part"))


def test_source_rewritten_between_reads(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    file = family.models[1] / "model.safetensors"
    action = lambda: file.write_bytes(file.read_bytes())  # noqa: E731
    change_between_reads(family, tmp_path / "out", action, str(family.models[1]), "model.safetensors", "changed since")


def test_source_replaced_between_reads(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    file = family.models[1] / "model.safetensors"

    def replace() -> None:
        shutil.copy2(family.models[0] / "model.safetensors", tmp_path / "new")
        os.replace(tmp_path / "new", file)  # noqa: PTH105

    change_between_reads(family, tmp_path / "out", replace, str(family.models[1]), "changed since")


def test_source_removed_between_reads(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    file = family.models[1] / "model.safetensors"
    change_between_reads(family, tmp_path / "out", file.unlink, str(family.models[1]), "changed since", "absent")


@pytest.mark.parametrize("bit", range(8))
def test_bit_flipped_between_reads(tmp_path: Path, bit: int) -> None:
    """Size, time and inode stay: only the checksum of the bytes can tell."""
    family = tiny_family(tmp_path)
    file = family.models[1] / "model.safetensors"

    def flip() -> None:
        status = file.stat()
        flip_bit(file, data_start(file) + 40 * bit, bit)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    change_between_reads(family, tmp_path / "out", flip, str(family.models[1]), "model.safetensors", "first read")


def test_after_a_lost_bit_overwrite_starts_again(tmp_path: Path) -> None:
    """What the error advises must help: the statistics of the first read are not taken up again."""
    family = tiny_family(tmp_path)
    file, output = family.models[1] / "model.safetensors", tmp_path / "out"

    def flip() -> None:
        status = file.stat()
        flip_bit(file, data_start(file) + 40)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    change_between_reads(family, output, flip, "--overwrite", "first read")
    recipe = family.recipe(pipeline={"file_size": "200"})
    refused(recipe, output, VerificationError, "first read", resources=without_retention(recipe, output))
    report = merge(str(recipe), str(output), overwrite=True)
    assert report["resumed_files"] == 0
    assert load_folder(output).keys() == set(TINY)
