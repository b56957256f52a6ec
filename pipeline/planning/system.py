"""What a plan says of second moments: where each lies, and whose values it weighs.

Owns the data classes of linear systems and metrics. Knows neither how statistics are stored nor how systems are solved.
"""

from __future__ import annotations

from dataclasses import dataclass

# What the moments of one tensor may be, by the word of the plan: "weights" are derived from the task vectors.
OBJECTIVES = ("diagonal", "gram", "kfac", "block", "weights")
# Objectives whose systems are solved element by element, chunk by chunk; all others need the whole tensor.
ELEMENTWISE = frozenset({"diagonal"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistic:
    """Where one statistic of a tensor lies: the upper triangle of a matrix, row by row, or a diagonal.

    Attributes:
        statistics: Index into the plan's `statistics`.
        kind: "diagonal", "input_gram", "output_gram" or "block".
        file: Index of the file.
        start: Absolute byte offset.
        dtype: Header dtype, "F32" or "F64".
        size: d of the d × d matrix, or the number of the diagonal's elements.
    """

    statistics: int
    kind: str
    file: int
    start: int
    dtype: str
    size: int

    @property
    def elements(self) -> int:
        """How many numbers are stored."""
        return self.size if self.kind == "diagonal" else self.size * (self.size + 1) // 2

    @property
    def size_bytes(self) -> int:
        """Their bytes."""
        return self.elements * (8 if self.dtype == "F64" else 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One term of a system: it draws the solution towards the values of one input.

    Attributes:
        input: Index of the input.
        weight: What the moments are multiplied by.
        statistics: The moments; of K-FAC the input's, then the output's; none where they are derived.
        data_size: Of the term's training data, where the method counts it.
    """

    input: int
    weight: float
    statistics: tuple[Statistic, ...]
    data_size: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """The linear system that one tensor solves.

    Attributes:
        objective: One of `OBJECTIVES`.
        terms: In the order of the models.
        anchor: The base's own term, of a method that has one.
    """

    objective: str
    terms: tuple[Term, ...]
    anchor: Term | None = None

    @property
    def elementwise(self) -> bool:
        """Whether it is solved chunk by chunk."""
        return self.objective in ELEMENTWISE

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """All its moments, term by term."""
        terms = self.terms if self.anchor is None else (*self.terms, self.anchor)
        return tuple(statistic for term in terms for statistic in term.statistics)


@dataclass(frozen=True, slots=True, kw_only=True)
class Solver:
    """How systems are solved: part of the method, for what a few iterations give depends on where they start.

    Attributes:
        rule: "quotient" (Fisher), "gradient_matching" (Daheim), "direct" or "iterative".
        start: "average", "zero", "base", "task_arithmetic" or "checkpoint".
        start_scale: Factor on the sum of the task vectors, where that is the start.
        start_input: Index of the input that is the start, if one is.
        iterations: Most iterations of one system.
        tolerance: Relative residual that ends them.
        off_diagonal: Factor on what lies off the diagonal of each moment.
        normalize: Whether each model's diagonals are divided by their global norm.
        prior: δ of the base's term.
    """

    rule: str
    start: str = "average"
    start_scale: float = 1.0
    start_input: int | None = None
    iterations: int = 100
    tolerance: float = 1e-5
    off_diagonal: float = 1.0
    normalize: bool = False
    prior: float = 0.0
