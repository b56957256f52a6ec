"""Moments of the gradients of single examples: squares of every element, or outer products of whole vectors.

Owns the sums. Must not know how the log-likelihoods were made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from pipeline.calibration.grams import Key
from pipeline.calibration.likelihood import Score
from pipeline.calibration.model import Parameter
from pipeline.errors import CalibrationError, Problem


class GradientMoments:
    """Sums weight · g∘g ("diagonal") or weight · g gᵀ ("block") over examples, one example at a time.

    Args:
        parameters: By name, those that may be asked for.
    """

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self._parameters = parameters
        self._sums: dict[Key, torch.Tensor] = {}

    def gather(self, wanted: Sequence[Key]) -> None:
        """Begin anew, with these; only their parameters get gradients."""
        for _, name in self._sums:
            self._parameters[name].value.requires_grad_(False)
        self._sums.clear()
        for kind, name in wanted:
            value = self._parameters[name].value.requires_grad_(True)
            shape = value.shape if kind == "diagonal" else (value.numel(), value.numel())
            self._sums[kind, name] = torch.zeros(shape, device=value.device)

    def add(self, scores: Sequence[Score]) -> None:
        """Add one example.

        Args:
            scores: Its weighted log-likelihoods, each of shape (1,).
        """
        values = [self._parameters[name].value for _, name in self._sums]
        for number, (weight_B, loglik_B) in enumerate(scores, start=1):
            if loglik_B.numel() != 1:
                raise ValueError("the squares of a batch's gradient are not those of its examples")
            weight = float(weight_B)
            # Everything but the last score leaves the graph to the others.
            gradients: Sequence[torch.Tensor | None] = torch.autograd.grad(
                loglik_B.sum(), values, retain_graph=number < len(scores), allow_unused=True
            )
            for (kind, name), gradient in zip(self._sums, gradients, strict=True):
                if gradient is None:
                    continue
                if kind == "diagonal":
                    self._sums[kind, name].addcmul_(gradient, gradient, value=weight)
                else:
                    flat = gradient.flatten()
                    self._sums[kind, name].addr_(flat, flat, alpha=weight)

    def take(self, examples: int) -> Iterator[tuple[Key, torch.Tensor]]:
        """Yield the means over the examples; each is forgotten then.

        Raises:
            CalibrationError: One is not finite.
        """
        for key in list(self._sums):
            mean = self._sums.pop(key).div_(examples)
            self._parameters[key[1]].value.requires_grad_(False)
            if not bool(mean.isfinite().all()):
                what = "its gradients are not finite, or too large to be squared in fp32"
                raise CalibrationError(Problem(what=what, where=f"parameter {key[1]}"))
            yield key, mean
