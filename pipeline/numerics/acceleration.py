"""Acceleration of a fixed-point iteration on coefficients that add up to one: mixed and lengthened steps.

Owns the proposals, not their acceptance; must not know what is iterated.

Legend: N coefficients, H past steps.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from pipeline.numerics.distance_frame import Floats

# Differences of residuals below this share of the largest are rounding and carry no direction.
_RANK = 1e-10


class AndersonMixer:
    """The last few steps of c ↦ T(c), and the guess they lead to.

    Args:
        depth: H, how many differences of steps to mix; one per dimension of the problem is enough.
    """

    __slots__ = ("_images", "_residuals")

    def __init__(self, depth: int) -> None:
        self._images: deque[Floats] = deque(maxlen=depth + 1)
        self._residuals: deque[Floats] = deque(maxlen=depth + 1)

    def propose(self, coefficients_N: Floats, image_N: Floats) -> Floats:
        """Return the mix of past images whose residual would vanish if T were affine.

        Args:
            coefficients_N: (N,) float64, c.
            image_N: (N,) float64, T(c).

        Returns:
            (N,) float64 of sum one; T(c) itself if the mix has a negative coefficient, which no median has.
        """
        self._images.append(image_N)
        self._residuals.append(image_N - coefficients_N)
        if len(self._images) == 1:
            return image_N
        residuals = np.stack(tuple(self._residuals))
        images = np.stack(tuple(self._images))
        steps = np.diff(residuals, axis=0)
        scales = np.linalg.norm(steps, axis=1, keepdims=True)
        if not scales.all():
            return image_N
        mix = np.linalg.lstsq((steps / scales).T, residuals[-1], rcond=_RANK)[0]
        guess = image_N - mix @ (np.diff(images, axis=0) / scales)
        if not np.isfinite(guess).all() or guess.min() < 0.0:
            return image_N
        return np.asarray(guess / guess.sum())


def extrapolate(coefficients_N: Floats, image_N: Floats, stretch: float) -> Floats:
    """Return c + stretch·(T(c) − c), shortened where a coefficient would become negative.

    Args:
        coefficients_N: (N,) float64, c.
        image_N: (N,) float64, T(c), positive.
        stretch: At least one.

    Returns:
        (N,) float64, not negative, of sum one.
    """
    step = image_N - coefficients_N
    falling = step < 0.0
    if falling.any():
        # Half the way from T(c) to the first zero: a coefficient of zero is no candidate for a median.
        limit = 0.5 + 0.5 * float((coefficients_N[falling] / -step[falling]).min())
        stretch = max(1.0, min(stretch, limit))
    guess = np.maximum(coefficients_N + stretch * step, 0.0)
    return np.asarray(guess / guess.sum())
