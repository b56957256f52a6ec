"""Merges that solve linear systems, end to end, against dense solutions in NumPy from the same files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import BudgetError, CheckpointError
from pipeline.merging import Resources, merge
from tests.support.adapters import Layout, linears, make_adapters
from tests.support.cases import refused
from tests.support.families import Family, fine_tune, load_folder, make_family, random_weights, save_model
from tests.support.moments import EMBEDDING, MATRICES, SHAPES, Arrays, Moments, save_statistics, with_statistics

SMALL_FILES = {"file_size": "600B"}
OUTSIDE = {EMBEDDING: "an embedding"}
SHAPES_OF_MATRICES = {name: SHAPES[name] for name in MATRICES}
VECTORS = {name: shape for name, shape in SHAPES.items() if len(shape) == 1}
# Values are near 0.1 and written in float32.
ROUNDING = 1.5e-8


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), 3, shapes=SHAPES)


@pytest.fixture(scope="module")
def diagonals(family: Family) -> Moments:
    return with_statistics(family, ["diagonal"], SHAPES)


@pytest.fixture(scope="module")
def grams(family: Family) -> Moments:
    return with_statistics(family, ["input_gram", "output_gram"], SHAPES_OF_MATRICES, outside=OUTSIDE)


@pytest.fixture(scope="module")
def blocks(family: Family) -> Moments:
    return with_statistics(family, ["block"], VECTORS, outside=dict.fromkeys((EMBEDDING, *MATRICES), "a matrix"))


def mean(moments: Moments, name: str, weights: tuple[float, ...] = (1.0, 1.0, 1.0)) -> np.ndarray:
    result: np.ndarray = sum(w * x for w, x in zip(weights, moments.values(name), strict=True)) / sum(weights)  # type: ignore[assignment]
    return result


def quotient(moments: Moments, name: str, factors: tuple[float, ...] = (1.0, 1.0, 1.0)) -> np.ndarray:
    found = [f * a["diagonal", name].astype(np.float64) for f, a in zip(factors, moments.arrays, strict=True)]
    result: np.ndarray = sum(f * x for f, x in zip(found, moments.values(name), strict=True)) / sum(found)  # type: ignore[assignment]
    return result


def in_x(moments: Moments, name: str) -> list[np.ndarray]:
    """The models' matrices as X = Wᵀ."""
    return [value.T for value in moments.values(name)]


def least_squares(grams: list[np.ndarray], values: list[np.ndarray]) -> np.ndarray:
    return np.linalg.solve(sum(grams), sum(a @ x for a, x in zip(grams, values, strict=True)))  # type: ignore[arg-type]


def kind(moments: Moments, what: str, name: str, off_diagonal: float = 1.0) -> list[np.ndarray]:
    found = [arrays[what, name].astype(np.float64) for arrays in moments.arrays]  # type: ignore[index]
    return [off_diagonal * a + (1 - off_diagonal) * np.diag(np.diag(a)) for a in found]


def kronecker(moments: Moments, name: str) -> np.ndarray:
    lefts, rights, values = kind(moments, "input_gram", name), kind(moments, "output_gram", name), in_x(moments, name)
    system = sum(np.kron(a, b) for a, b in zip(lefts, rights, strict=True))
    rhs = sum((a @ x @ b).ravel() for a, x, b in zip(lefts, values, rights, strict=True))
    result: np.ndarray = np.linalg.solve(system, rhs).reshape(values[0].shape).T  # type: ignore[arg-type]
    return result


def assert_merged(out: Path, wanted: Callable[[str], np.ndarray], within: float = ROUNDING) -> None:
    found = load_folder(out)
    # Every parameter is in the output, once.
    assert set(found) == set(SHAPES)
    for name, value in found.items():
        np.testing.assert_allclose(value.double().numpy(), wanted(name), rtol=0, atol=within, err_msg=name)


def names(report: Mapping[str, object], treatment: str) -> set[str]:
    found: set[str] = set(report["treatments"][treatment]["names"])  # type: ignore[index]
    return found


def test_fisher_is_the_quotient(diagonals: Moments, tmp_path: Path) -> None:
    weights = (1.0, 2.0, 0.5)
    recipe = diagonals.recipe("fisher", models=[{"weight": w} for w in weights], pipeline=SMALL_FILES)
    report = merge(str(recipe), str(tmp_path / "out"))
    assert_merged(tmp_path / "out", lambda name: quotient(diagonals, name, weights))
    assert names(report, "solved") == set(SHAPES)
    assert len(report["files"]) > 2
    first = next(entry for entry in report["systems"] if entry["tensor"] == MATRICES[0])
    traces = [
        w * a["diagonal", MATRICES[0]].astype(np.float64).sum() for w, a in zip(weights, diagonals.arrays, strict=True)
    ]
    np.testing.assert_allclose(first["traces"], traces, rtol=1e-12)


def test_fisher_of_one_global_norm(diagonals: Moments, tmp_path: Path) -> None:
    recipe = diagonals.recipe("fisher", parameters={"normalize": True}, pipeline=SMALL_FILES)
    merge(str(recipe), str(tmp_path / "out"), resources=Resources(workers=2))
    squares = [sum((array.astype(np.float64) ** 2).sum() for array in arrays.values()) for arrays in diagonals.arrays]
    norms = tuple(1 / np.sqrt(square) for square in squares)
    assert_merged(tmp_path / "out", lambda name: quotient(diagonals, name, norms))


def test_diagonal_mats_is_fisher(diagonals: Moments, tmp_path: Path) -> None:
    recipe = diagonals.recipe("mats", parameters={"objective": "diagonal"})
    merge(str(recipe), str(tmp_path / "out"))
    assert_merged(tmp_path / "out", lambda name: quotient(diagonals, name))


@pytest.mark.parametrize("with_base", [False, True])
def test_gradient_matching(family: Family, diagonals: Moments, tmp_path: Path, with_base: bool) -> None:
    alphas, sizes, prior = (0.5, 0.25, 1.0), (3.0, 20.0, 30.0), 0.125
    anchors = {name: np.full(shape, 0.5 + len(name) % 3, dtype=np.float32) for name, shape in SHAPES.items()}
    folder = save_statistics(
        tmp_path / "base", {("diagonal", name): value for name, value in anchors.items()}, examples=4
    )
    # The first model says how much data it had; of the others the statistics do.
    models = [{"weight": alphas[0], "data_size": 3}, *({"weight": alpha} for alpha in alphas[1:])]
    settings = {"base_statistics": str(folder)} if with_base else {}
    recipe = diagonals.recipe(
        "uncertainty_gradient_matching", models=models, parameters={"prior": prior}, pipeline=settings
    )
    merge(str(recipe), str(tmp_path / "out"))

    def wanted(name: str) -> np.ndarray:
        base = diagonals.base(name)
        hessians = [s * a["diagonal", name].astype(np.float64) for s, a in zip(sizes, diagonals.arrays, strict=True)]
        anchor = prior + (4 * anchors[name].astype(np.float64) if with_base else 0.0)
        total = anchor + sum(a * h for a, h in zip(alphas, hessians, strict=True))
        steps = zip(alphas, hessians, diagonals.values(name), strict=True)
        return base + sum(a * (anchor + h) * (x - base) for a, h, x in steps) / total  # type: ignore[no-any-return]

    assert_merged(tmp_path / "out", wanted)


@pytest.mark.parametrize("off_diagonal", [1.0, 0.25])
def test_regmean_is_least_squares(grams: Moments, tmp_path: Path, off_diagonal: float) -> None:
    weights = (1.0, 2.0, 0.5)
    recipe = grams.recipe(
        "regmean",
        models=[{"weight": w} for w in weights],
        parameters={"off_diagonal": off_diagonal},
        pipeline={"average": ["lm_head.*"], **SMALL_FILES},
    )
    report = merge(str(recipe), str(tmp_path / "out"))

    def wanted(name: str) -> np.ndarray:
        if name not in MATRICES or name == "lm_head.weight":
            return mean(grams, name, weights)
        weighted = [w * a for w, a in zip(weights, kind(grams, "input_gram", name, off_diagonal), strict=True)]
        return least_squares(weighted, in_x(grams, name)).T

    assert_merged(tmp_path / "out", wanted)
    # The averaged are the vectors, what the statistics leave out, and what the recipe lists; all adds up.
    assert names(report, "averaged") == {*VECTORS, EMBEDDING, "lm_head.weight"}
    assert names(report, "solved") == set(MATRICES) - {"lm_head.weight"}
    assert sum(report["treatments"][kind]["tensors"] for kind in ("solved", "averaged", "copied")) == len(SHAPES)


def test_mats_with_input_grams(grams: Moments, tmp_path: Path) -> None:
    recipe = grams.recipe("mats", parameters={"tolerance": 1e-7}, pipeline=SMALL_FILES)
    report = merge(str(recipe), str(tmp_path / "out"))

    def wanted(name: str) -> np.ndarray:
        if name not in MATRICES:
            return mean(grams, name)
        return least_squares(kind(grams, "input_gram", name), in_x(grams, name)).T

    assert_merged(tmp_path / "out", wanted)
    assert {entry["tensor"] for entry in report["systems"]} == set(MATRICES)
    assert all(entry["converged"] and entry["stopped"] == "converged" for entry in report["systems"])
    # As many distinct eigenvalues as inputs, and room for rounding.
    assert all(0 < entry["iterations"] <= 2 * max(entry["shape"]) for entry in report["systems"])


@pytest.mark.parametrize("resident", [True, False])
def test_mats_with_pairs_of_grams(
    grams: Moments, tmp_path: Path, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not resident:
        monkeypatch.setattr("pipeline.engine.systems.MatrixRoom.is_resident", lambda *_: False)
    parameters = {"objective": "kfac", "tolerance": 1e-7, "iterations": 400}
    report = merge(str(grams.recipe("mats", parameters=parameters)), str(tmp_path / "out"))
    assert_merged(tmp_path / "out", lambda name: kronecker(grams, name) if name in MATRICES else mean(grams, name))
    inputs, outputs = (kind(grams, what, MATRICES[0]) for what in ("input_gram", "output_gram"))
    first = next(entry for entry in report["systems"] if entry["tensor"] == MATRICES[0])
    traces = [np.trace(a) * np.trace(b) for a, b in zip(inputs, outputs, strict=True)]
    np.testing.assert_allclose(first["traces"], traces, rtol=1e-6)


def test_blocks_of_vectors(blocks: Moments, tmp_path: Path) -> None:
    recipe = blocks.recipe("mats", parameters={"objective": "block", "tolerance": 1e-7})
    merge(str(recipe), str(tmp_path / "out"))

    def wanted(name: str) -> np.ndarray:
        if name not in VECTORS:
            return mean(blocks, name)
        return least_squares(kind(blocks, "block", name), blocks.values(name))

    assert_merged(tmp_path / "out", wanted)


def test_wudi_takes_its_moments_from_the_weights(family: Family, tmp_path: Path) -> None:
    plain = Moments(family)
    report = merge(str(plain.recipe("wudi", pipeline={"average": ["lm_head.*"]})), str(tmp_path / "out"))

    def wanted(name: str) -> np.ndarray:
        if len(SHAPES[name]) < 2 or name == "lm_head.weight":
            return mean(plain, name)
        deltas = [value - plain.base(name) for value in plain.values(name)]
        moments = [delta.T @ delta / (delta**2).sum() for delta in deltas]
        merged = sum(d @ c for d, c in zip(deltas, moments, strict=True)) @ np.linalg.pinv(sum(moments))  # type: ignore[arg-type]
        return plain.base(name) + merged  # type: ignore[no-any-return]

    assert_merged(tmp_path / "out", wanted)
    assert all(sum(entry["traces"]) == pytest.approx(3.0) for entry in report["systems"])


STARTS = {
    "average": {},
    "zero": {"start": "zero"},
    "base": {"start": "base"},
    "task_arithmetic": {"start": "task_arithmetic", "start_scale": 0.3},
}


@pytest.mark.parametrize("start", [*STARTS, "checkpoint"])
def test_no_iteration_gives_the_start(family: Family, grams: Moments, tmp_path: Path, start: str) -> None:
    other = fine_tune(random_weights(0, shapes=SHAPES), 77)
    folder = save_model(tmp_path / "other", other, dtype=torch.float32)
    settings = STARTS.get(start, {"start": str(folder)})
    # A residual is never larger than the larger of itself and the right-hand side.
    recipe = grams.recipe("mats", parameters={"tolerance": 1.0}, pipeline=settings)
    report = merge(str(recipe), str(tmp_path / "out"))

    def wanted(name: str) -> np.ndarray:
        base, values = grams.base(name), grams.values(name)
        if start == "average" or name not in MATRICES:
            return mean(grams, name)
        by_start: dict[str, np.ndarray] = {
            "zero": np.zeros_like(base),
            "base": base,
            "task_arithmetic": base + 0.3 * sum(value - base for value in values),
            "checkpoint": other[name].float().double().numpy(),
        }
        return by_start[start]

    assert_merged(tmp_path / "out", wanted)
    assert {entry["iterations"] for entry in report["systems"]} == {0}


@pytest.mark.parametrize("start", ["average", "base"])
@pytest.mark.parametrize(("method", "parameters"), [("regmean", {}), ("mats", {}), ("mats", {"objective": "kfac"})])
def test_what_no_model_sees_keeps_the_start(
    family: Family, grams: Moments, tmp_path: Path, method: str, parameters: dict[str, object], start: str
) -> None:
    name = MATRICES[0]
    moments = Moments(family)
    for row, arrays in enumerate(grams.arrays):
        dead = arrays["input_gram", name].copy()
        dead[2] = dead[:, 2] = 0.0
        found: Arrays = {**arrays, ("input_gram", name): dead}
        moments.folders.append(save_statistics(tmp_path / f"dead{row}", found, outside=OUTSIDE))
    report = merge(str(moments.recipe(method, parameters=parameters, pipeline={"start": start})), str(tmp_path / "out"))
    merged = load_folder(tmp_path / "out")[name].double().numpy()
    wanted = mean(moments, name) if start == "average" else moments.base(name)
    np.testing.assert_allclose(merged[:, 2], wanted[:, 2], rtol=0, atol=ROUNDING)
    assert np.abs(merged - wanted).max() > 1e-4
    entry = next(entry for entry in report["systems"] if entry["tensor"] == name)
    assert entry["null_directions"] == (9 if parameters else 1)
    assert any("no model's statistics see keep the start's values" in note for note in report["notes"])


def test_zero_diagonals_keep_the_average_or_the_start(family: Family, diagonals: Moments, tmp_path: Path) -> None:
    moments = Moments(family)
    for row, arrays in enumerate(diagonals.arrays):
        unseen = arrays["diagonal", EMBEDDING].copy()
        unseen[3] = 0.0
        found: Arrays = {**arrays, ("diagonal", EMBEDDING): unseen}
        moments.folders.append(save_statistics(tmp_path / f"unseen{row}", found))
    merge(str(moments.recipe("fisher")), str(tmp_path / "fisher"))
    started = moments.recipe("mats", parameters={"objective": "diagonal"}, pipeline={"start": "base"})
    merge(str(started), str(tmp_path / "mats"))
    rows = [load_folder(tmp_path / out)[EMBEDDING].double().numpy()[3] for out in ("fisher", "mats")]
    np.testing.assert_allclose(rows[0], mean(moments, EMBEDDING)[3], rtol=0, atol=ROUNDING)
    np.testing.assert_array_equal(rows[1], moments.base(EMBEDDING)[3])


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("fisher", {}), ("regmean", {}), ("mats", {}), ("mats", {"objective": "kfac"}), ("wudi", {})],
)
def test_equal_models_come_back_bit_for_bit(
    family: Family, diagonals: Moments, grams: Moments, tmp_path: Path, method: str, parameters: dict[str, object]
) -> None:
    of = diagonals if method == "fisher" else grams
    # Copies, because the same folder twice is an error.
    copies = [save_model(tmp_path / f"copy{row}", fine_tune(random_weights(0, shapes=SHAPES), 5)) for row in range(3)]
    same = Family(root=tmp_path, base=family.base, models=copies)
    moments = Moments(same, folders=of.folders if method != "wudi" else [])
    report = merge(str(moments.recipe(method, parameters=parameters)), str(tmp_path / "out"))
    wanted = load_folder(copies[0])
    assert all(torch.equal(value, wanted[name]) for name, value in load_folder(tmp_path / "out").items())
    assert {entry["iterations"] for entry in report["systems"]} == {0}


@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.parametrize("objective", ["gram", "kfac", "diagonal"])
def test_a_common_scale_of_all_statistics_changes_nothing(
    family: Family, diagonals: Moments, grams: Moments, tmp_path: Path, objective: str, scale: float
) -> None:
    of = diagonals if objective == "diagonal" else grams
    folders = [
        save_statistics(
            tmp_path / f"scaled{row}", {k: a * np.float32(scale) for k, a in arrays.items()}, outside=OUTSIDE
        )
        for row, arrays in enumerate(of.arrays)
    ]
    parameters = {"objective": objective, "iterations": 4, "tolerance": 1e-12}
    reports, found = [], []
    for name, moments in (("plain", of), ("scaled", Moments(family, folders=folders))):
        reports.append(merge(str(moments.recipe("mats", parameters=parameters)), str(tmp_path / name)))
        found.append(load_folder(tmp_path / name))
    for name, value in found[0].items():
        np.testing.assert_allclose(value.numpy(), found[1][name].numpy(), rtol=0, atol=2e-8, err_msg=name)
    # No silent standstill, whatever the unit: the average is not the answer.
    counts = [[entry["iterations"] for entry in report["systems"]] for report in reports]
    assert counts[0] == counts[1]
    assert np.abs(found[1][MATRICES[0]].double().numpy() - mean(of, MATRICES[0])).max() > 1e-4


def test_adapters_are_points_like_any_other(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", random_weights(0, shapes=SHAPES), dtype=torch.bfloat16)
    layouts = [
        Layout(modules=linears(SHAPES, "up_proj", "down_proj"), rank=2),
        Layout(modules=linears(SHAPES, "up_proj"), rank=3, dtype=torch.bfloat16),
    ]
    family = make_adapters(tmp_path, base, layouts)
    shapes = {name: shape for name, shape in SHAPES_OF_MATRICES.items() if name != "lm_head.weight"}
    for kinds, method in ((["input_gram"], "regmean"), (["diagonal"], "fisher")):
        # The head has no statistic, and needs none: no adapter touches it.
        moments = with_statistics(family, kinds, shapes)  # type: ignore[arg-type]
        report = merge(str(moments.recipe(method, out_dtype="float32")), str(tmp_path / method))
        found = load_folder(tmp_path / method)
        assert names(report, "solved") == set(shapes)
        for name in SHAPES:
            values = [model[name].numpy() for model in family.values]
            if name not in shapes:
                wanted = values[0]
            elif method == "regmean":
                wanted = least_squares(kind(moments, "input_gram", name), [value.T for value in values]).T
            else:
                weights = kind_diagonals(moments, name)
                wanted = sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)  # type: ignore[assignment]
            np.testing.assert_allclose(found[name].double().numpy(), wanted, rtol=0, atol=ROUNDING, err_msg=name)


def kind_diagonals(moments: Moments, name: str) -> list[np.ndarray]:
    return [arrays["diagonal", name].astype(np.float64) for arrays in moments.arrays]


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_values_that_are_not_finite(
    family: Family, diagonals: Moments, grams: Moments, tmp_path: Path, method: str
) -> None:
    of = diagonals if method == "fisher" else grams
    values = {name: value.clone() for name, value in family.values[1].items()}
    values[MATRICES[0]][1, 2] = float("nan")
    broken = save_model(tmp_path / "broken", values, dtype=torch.float32)
    models = [family.models[0], broken, family.models[2]]
    moments = Moments(Family(root=tmp_path, base=family.base, models=models), folders=of.folders)
    refused(moments.recipe(method), tmp_path / "out", CheckpointError, "broken", MATRICES[0], "NaN or infinite")
    repaired = moments.recipe(method, name="repaired.yaml", pipeline={"non_finite": "base"})
    report = merge(str(repaired), str(tmp_path / "repaired"))
    values[MATRICES[0]][1, 2] = family.base_values[MATRICES[0]][1, 2]
    save_model(tmp_path / "broken", values, dtype=torch.float32)
    merge(str(moments.recipe(method, name="whole.yaml")), str(tmp_path / "whole"))
    found, wanted = (load_folder(tmp_path / out) for out in ("repaired", "whole"))
    for name, value in found.items():
        np.testing.assert_allclose(value.numpy(), wanted[name].numpy(), rtol=0, atol=1e-9)
    assert any("1 values were NaN or infinite and taken from the base" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("bad", "said"), [(np.nan, "not a finite number"), (np.inf, "not a finite number"), (-1.0, "negative")]
)
@pytest.mark.parametrize("method", ["fisher", "regmean", "mats"])
def test_statistics_that_are_no_moments(
    family: Family, diagonals: Moments, grams: Moments, tmp_path: Path, method: str, bad: float, said: str
) -> None:
    of, what = (diagonals, "diagonal") if method == "fisher" else (grams, "input_gram")
    arrays = {key: array.copy() for key, array in of.arrays[1].items()}
    arrays[what, MATRICES[0]][1, 1] = bad  # type: ignore[index]
    folder = save_statistics(tmp_path / "bad", arrays, outside=OUTSIDE)
    moments = Moments(family, folders=[of.folders[0], folder, of.folders[2]])
    text = refused(moments.recipe(method), tmp_path / "out", CheckpointError, said, str(folder), MATRICES[0])
    assert "average: [" in text


def test_a_budget_too_small_for_a_matrix_is_refused_with_the_number(grams: Moments, tmp_path: Path) -> None:
    recipe = grams.recipe("mats", parameters={"objective": "kfac"})
    text = refused(recipe, tmp_path / "out", BudgetError, "matrix", resources=Resources(memory_bytes=660_000_000))
    needed = int(text.rpartition("--memory ")[2].partition("MB")[0]) * 1_000_000
    merge(str(recipe), str(tmp_path / "out"), resources=Resources(memory_bytes=needed))
