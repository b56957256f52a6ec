"""Methods and literal recipes that the tests of this room share."""

from pipeline.errors import RecipeError
from pipeline.recipe import MethodSchema, Parameter, Recipe, parse_recipe

LINEAR = MethodSchema(
    name="linear",
    uses_statistics=False,
    parameters=(
        Parameter(name="weight", kind="number", default=1.0, per_model=True, description="Share of a model."),
        Parameter(name="normalize", kind="boolean", default=True, per_model=False, description="Divide by the sum."),
    ),
)
MEDIAN = MethodSchema(
    name="geometric_median",
    uses_statistics=True,
    parameters=(
        Parameter(
            name="weight",
            kind="number",
            default=1.0,
            per_model=True,
            positive=True,
            constant=True,
            description="Weight of a model.",
        ),
    ),
)
TIES = MethodSchema(
    name="ties",
    uses_statistics=False,
    parameters=(
        Parameter(name="weight", kind="number", default=None, per_model=True, description="Weight of a model."),
        Parameter(name="density", kind="number", default=1.0, per_model=True, positive=True, description="Kept part."),
        Parameter(name="t", kind="number", default=None, per_model=False, description="Required for all."),
    ),
)
MATS = MethodSchema(
    name="mats",
    uses_statistics=False,
    parameters=(
        Parameter(name="weight", kind="number", default=1.0, per_model=True, constant=True, description="Weight."),
        Parameter(
            name="objective",
            kind="word",
            default="gram",
            per_model=False,
            choices=("gram", "kfac"),
            description="Which moments.",
        ),
        Parameter(name="iterations", kind="count", default=100, per_model=False, description="Most iterations."),
        Parameter(
            name="off_diagonal",
            kind="number",
            default=1.0,
            per_model=False,
            bounds=(0.0, 1.0),
            description="What is left off the diagonal.",
        ),
        Parameter(
            name="data_size", kind="number", default=None, per_model=True, optional=True, description="How much data."
        ),
    ),
    moment_keys=("start", "start_scale", "average"),
    needs_moments=True,
    solves=True,
)
ROOTED = MethodSchema(
    name="rooted", uses_statistics=False, parameters=(), moment_keys=("base_statistics",), needs_base=True
)
METRIC = MethodSchema(name="metric_median", uses_statistics=True, parameters=(), moment_keys=("average", "metric"))
METHODS = {method.name: method for method in (LINEAR, MEDIAN, TIES, MATS, ROOTED, METRIC)}

# Each is a whole recipe that must be accepted.
ACCEPTED = {
    "statistics": """
merge_method: mats
base_model: base
parameters: {objective: kfac, iterations: 20}
models:
  - model: a
    parameters: {weight: 2, data_size: 1e5}
    pipeline: {statistics: s3://bucket/statistics+a}
  - model: b
    pipeline: {statistics: ./b}
pipeline:
  start: task_arithmetic
  start_scale: 0.3
  average: ["*.embed*", lm_head.weight]
""",
    "start at a checkpoint": """
merge_method: mats
models: [{model: a, pipeline: {statistics: s}}]
pipeline: {start: s3://bucket/merged}
""",
    "statistics of the base": "merge_method: rooted\nbase_model: b\nmodels: [{model: a}]\n"
    "pipeline: {base_statistics: c}",
    "metric": """
merge_method: metric_median
models: [{model: a}]
pipeline: {metric: {kind: gram, statistics: s}, average: ["*norm*"]}
""",
    "nothing about moments": "merge_method: mats\nmodels: [{model: a, pipeline: {statistics: s}}]\n"
    "pipeline: {start: null, average: null}",
    "least": "merge_method: linear\nmodels: [{model: a}]",
    "mergekit linear": """
merge_method: linear
dtype: bfloat16
models:
  - model: /models/ft1
    parameters: {weight: 0.6}
  - model: /models/ft2
    parameters: {weight: 0.4}
""",
    "linear with a base as input": """
merge_method: linear
base_model: base
parameters: {weight: 1, normalize: false}
models: [{model: a}, {model: b}]
""",
    "every key": """
merge_method: geometric_median
base_model: s3://bucket/base@v1
dtype: torch.float32
out_dtype: bfloat16
tokenizer_source: base
parameters: {weight: 2}
models:
  - model: s3://bucket/a
    parameters: {weight: 1e-5}
  - model: {model: {path: "./odd+name@home"}}
pipeline:
  scope: block
  distances: stream
  scale: norm
  tolerance: 1e-8
  file_size: 512MiB
  non_finite: base
  bandwidth: 2GB
  storage:
    s3: {region: eu-central-1}
    s3://bucket/base: {endpoint_url: "https://store.example:9000", profile: nightly, anon: false}
    gs: {project: p, consistency: none, nested: {retries: [1, 2]}}
""",
    "adapters": r"""
merge_method: linear
base_model: models/base
tokenizer_source: models/base+adapters/chat
models:
  - model: adapters/law
  - model: models/base+adapters/chat
  - model: {model: {path: "models/c++"}, lora: {path: adapters/x@home}}
  - model: 's3://b@1/c\+\++s3://b/lora@2'
  - model: models/other
pipeline: {output: adapter, rank: 8}
""",
    "adapter as base": "merge_method: linear\nbase_model: a+b\nmodels: [{model: c}, {model: a+c}, {model: b}]",
    "adapter in full": "merge_method: geometric_median\npipeline: {output: adapter, rank: }\nmodels: [{model: a}]",
    "named scope": """
merge_method: geometric_median
models: [{model: a}, {model: b}]
pipeline:
  scope:
    - {name: attention, tensors: ["*.self_attn.*"]}
    - name: rest
      tensors: ["*"]
""",
    "gradients and filters": """
merge_method: ties
parameters: {t: 0, density: [0.1, 1]}
models:
  - model: a
    parameters:
      weight:
        - {filter: self_attn, value: [0, 0.5, 1]}
        - {filter: mlp, value: 0.2}
        - value: 0.7
  - model: b
    parameters: {weight: {value: "1e-3", filter: "*"}}
""",
    "idle keys": """
merge_method: linear
input_model_parameters: {}
embed_slerp: true
models: [{model: a, residual_weight: 0.5, parameters: {embed_slerp: true}}]
parameters: {int8_mask: true}
""",
    "keys left empty": """
merge_method: linear
base_model:
dtype:
parameters:
pipeline: {storage: }
models: [{model: a, parameters: }]
""",
    "tokenizer of a listed model": "merge_method: linear\ntokenizer_source: b\nmodels: [{model: a}, {model: b}]",
    "switch as a number": "merge_method: linear\nparameters: {normalize: 0}\nmodels: [{model: a}]",
    "scale one as text": "merge_method: geometric_median\npipeline: {scale: '1.0'}\nmodels: [{model: a}]",
}


def parse(text: str) -> Recipe:
    return parse_recipe(text, source="r.yaml", methods=METHODS)


def problems(text: str) -> list[str]:
    """Return what is wrong with a recipe, [] for a good one."""
    try:
        parse(text)
    except RecipeError as error:
        return [str(problem) for problem in error.problems]
    return []
