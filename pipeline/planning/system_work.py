"""How much arithmetic a plan's systems take: what files are dealt to workers by, and time is projected from.

Owns the count of operations. Pure arithmetic. Legend: I inputs, O outputs of a matrix, N models.
"""

from __future__ import annotations

from pipeline.planning.plan import Plan
from pipeline.planning.system_memory import matrix_bytes, matrix_sides
from pipeline.planning.traffic import statistics_bytes

# An eigendecomposition takes so many times the cube of its size; Cholesky a third.
_EIGEN = 10
# Operations that take as long as reading a byte, roughly: only the balance of workers depends on it.
_BYTE = 50


def matrix_operations(plan: Plan, index: int) -> int:
    """Return the floating-point operations of solving one matrix, if all iterations are made; 0 for other tensors."""
    tensor, solver = plan.tensors[index], plan.settings.solver
    system = tensor.system
    if system is None or solver is None or system.elementwise:
        return 0
    inputs, outputs = matrix_sides(tensor, system)
    models = len(system.terms)
    left, right = 2 * inputs * inputs * outputs, 2 * inputs * outputs * outputs
    if system.objective == "kfac":
        # Besides the iterations: the right-hand side, two residuals.
        return (solver.iterations + 3) * models * (left + right)
    gathered = models * (left if system.statistics else 2 * left)
    if solver.rule == "direct":
        return gathered + _EIGEN * inputs**3 + 2 * left
    return gathered + (solver.iterations + 2) * left


def streamed_bytes(plan: Plan, index: int, room_bytes: int) -> int:
    """Return the bytes of moments that are read again and again, if all iterations are made.

    Args:
        plan: The plan.
        index: Of the tensor.
        room_bytes: What a worker has for matrices; moments stay there where they fit.
    """
    tensor, solver = plan.tensors[index], plan.settings.solver
    if tensor.system is None or solver is None or tensor.system.objective != "kfac":
        return 0
    if matrix_bytes(plan, index, resident=True) <= room_bytes:
        return 0
    # A product a step, one for the right-hand side, one for the last residual.
    return statistics_bytes(tensor) * (solver.iterations + 2)


def file_load(plan: Plan, file: int) -> int:
    """Return what writing one output file costs, in units that only compare: its bytes, and its arithmetic."""
    layout = plan.files[file]
    return layout.size_bytes + sum(matrix_operations(plan, index) for index in layout.tensors) // _BYTE
