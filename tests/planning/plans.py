"""Small plans for the tests of this room and of those above it: by hand, and from real files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.merging import load_recipe
from pipeline.methods import registry
from pipeline.planning.build import build_plan
from pipeline.planning.plan import Input, Plan, Settings, Source, SourceFile, TensorPlan
from pipeline.planning.sources import Sources, open_sources
from tests.support.families import Family, make_family

# Two layers, an embedding and a head: every kind of place a tensor can have, at few bytes.
SMALL_SHAPES = {
    "model.embed_tokens.weight": (16, 4),
    "model.layers.0.mlp.up_proj.weight": (6, 4),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.1.mlp.up_proj.weight": (6, 4),
    "model.layers.1.self_attn.q_proj.weight": (4, 4),
    "model.norm.weight": (4,),
    "lm_head.weight": (16, 4),
}


def tensor(
    name: str, elements: int, *, dtype: str = "F32", group: int = 0, inputs: Sequence[str] = ("F32",)
) -> TensorPlan:
    """A tensor of one dimension whose sources have these dtypes."""
    sources = tuple(Source(file=0, start=0, dtype=word) for word in inputs)
    return TensorPlan(name=name, shape=(elements,), elements=elements, dtype=dtype, group=group, sources=sources)


def plan_by_hand(
    tensors: Sequence[TensorPlan],
    files: Sequence[object],
    *,
    inputs: int = 3,
    chunk_elements: int = 1 << 20,
    **settings: object,
) -> Plan:
    """A plan of a base and models without files behind it."""
    words: dict[str, object] = {
        "method": "geometric_median",
        "scope": "model",
        "distances": "gram",
        "scale": 1.0,
        "tolerance": 1e-10,
        "non_finite": "error",
        "cast": None,
        "measured": True,
    }
    return Plan(
        recipe={},
        settings=Settings(**{**words, **settings}),  # type: ignore[arg-type]
        inputs=tuple(
            Input(
                url=f"/m{index}",
                name=f"m{index}",
                files=(SourceFile(path="model.safetensors", size_bytes=1, version="1"),),
            )
            for index in range(inputs)
        ),
        base=0,
        donor=0,
        models=tuple(range(1, inputs)),
        weights=(1.0,) * (inputs - 1),
        tensors=tuple(tensors),
        files=tuple(files),  # type: ignore[arg-type]
        groups=(),
        chunk_elements=chunk_elements,
        notes=(),
    )


def plan_of(recipe: Path) -> Plan:
    """The plan of a recipe file."""
    return plan_and_sources(recipe)[0]


def plan_and_sources(recipe: Path) -> tuple[Plan, Sources]:
    """The plan of a recipe file, and its open checkpoints."""
    read = load_recipe(str(recipe))[0]
    sources = open_sources(read)
    return build_plan(read, registry()[read.merge_method], sources), sources


def small_family(root: Path, models: int = 3, **keys: object) -> Family:
    """A family of `SMALL_SHAPES`."""
    shapes: Mapping[str, tuple[int, ...]] = SMALL_SHAPES
    return make_family(root, models, **{"shapes": shapes, **keys})  # type: ignore[arg-type]
