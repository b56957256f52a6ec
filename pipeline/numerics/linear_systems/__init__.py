"""Solutions of (Σ Cᵢ) θ = Σ Cᵢ θᵢ, tensor by tensor: what Fisher merging, RegMean, MaTS and their kin come down to.

Owns the folder's division: `diagonal` has the elementwise closed forms, `dense` the direct solve, `kronecker` and
`conjugate_gradient` the iterative one, `moments` what is added up for a system; they are torch and are imported by
name. What everybody may ask for, which is the memory they take, is here too.
"""

from pipeline.numerics.linear_systems.sizes import (
    dense_work_bytes,
    diagonal_work_bytes,
    iteration_work_bytes,
    moments_work_bytes,
)

__all__ = ["dense_work_bytes", "diagonal_work_bytes", "iteration_work_bytes", "moments_work_bytes"]
