"""Corrects the memory estimate by finished jobs: how far it is off, and how sure that is. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import pstdev

from shared.contract.spec import DeviceKind, MethodName

PRIOR_SPREAD = 0.10  # of log(measured/predicted) before anything was measured; the published points scatter so
NOISE_FLOOR = 0.02  # two runs of the same job never agree better
UPPER = 1.2816  # standard deviations: nine of ten jobs stay below


@dataclass(frozen=True)
class Measurement:
    """Predicted and measured peak bytes of one finished attempt; `tokens` per forward pass."""

    base: str
    method: MethodName
    tokens: int
    predicted: int
    measured: int
    device: DeviceKind = "cuda"


@dataclass(frozen=True)
class Calibration:
    """How far the formula is off for one kind of job, and how sure that is.

    Attributes:
        factor: multiply a prediction by this.
        spread: standard deviation of the relative error that remains.
        count: measurements behind it.
    """

    factor: float = 1.0
    spread: float = PRIOR_SPREAD
    count: int = 0

    def expected(self, predicted: int) -> int:
        return math.ceil(predicted * self.factor)

    def upper(self, predicted: int) -> int:
        """Bytes to ask for: nine of ten such jobs need no more."""
        return math.ceil(predicted * self.factor * math.exp(UPPER * self.spread))

    @property
    def sure(self) -> str:
        """How sure the estimate is, in words."""
        basis = f"{self.count} finished jobs of this kind" if self.count else "the formula alone"
        return f"±{math.expm1(UPPER * self.spread):.0%} nine times of ten, from {basis}"


def bucket(tokens: int) -> int:
    """Length bucket of a forward pass: its token count rounded up to a power of two."""
    return 1 << max(0, tokens - 1).bit_length()


def calibrate(
    measurements: Sequence[Measurement], *, base: str, method: MethodName, tokens: int, device: DeviceKind = "cuda"
) -> Calibration:
    """What measurements of the same base, method and kind of device say, of the same length bucket if there are any."""
    alike = [
        measurement
        for measurement in measurements
        if (measurement.base, measurement.method, measurement.device) == (base, method, device)
    ]
    near = [measurement for measurement in alike if bucket(measurement.tokens) == bucket(tokens)]
    return _posterior(
        [math.log(measurement.measured / measurement.predicted) for measurement in near or alike], remote=not near
    )


def _posterior(ratios: Sequence[float], *, remote: bool) -> Calibration:
    """Normal prior around 1, normal noise: few measurements move the factor little (conjugate update)."""
    if not ratios:
        return Calibration()
    noise = max(NOISE_FLOOR, pstdev(ratios)) + (PRIOR_SPREAD / 2 if remote else 0.0)
    precision = 1 / PRIOR_SPREAD**2 + len(ratios) / noise**2
    center = sum(ratios) / noise**2 / precision
    return Calibration(factor=math.exp(center), spread=math.sqrt(1 / precision + noise**2), count=len(ratios))
