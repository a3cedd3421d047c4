"""What a process group measures about itself: time, speed, memory."""

from functools import lru_cache

import torch
import torch.distributed as dist

from parallelism import agreement, device
from parallelism.budget import Burnt, Stopwatch

PEAK_SECONDS = 0.3
"""How long the matrix product that MFU is held against is timed."""


class Instruments:
    """Made before the model is built. ``peak_flops`` is that of one device, from :func:`measured_peak_flops`."""

    def __init__(self, stopwatch: Stopwatch, peak_flops: float) -> None:
        self._stopwatch = stopwatch
        self._baseline_memory_bytes = device.baseline_memory_bytes()
        self._group_peak_flops = dist.get_world_size() * peak_flops

    def burnt(self) -> Burnt:
        """Consumed up to now by this attempt and the earlier ones."""
        return self._stopwatch.burnt()

    def mfu(self, flops: float, seconds: float) -> float:
        """Model-FLOP utilisation (Chowdhery et al., PaLM, 2022, appendix B) against the *measured* peak."""
        return flops / seconds / self._group_peak_flops

    def peak_memory(self) -> tuple[int, int]:
        """(peak, baseline) in bytes of the rank whose peak lies highest above its own baseline. Collective."""
        ranks = agreement.rows([device.peak_memory_bytes(), self._baseline_memory_bytes])
        peak, baseline = max(ranks, key=lambda row: row[0] - row[1])
        return int(peak), int(baseline)


@lru_cache
def measured_peak_flops(precision: str) -> float:
    """FLOP/s of a large matrix product on this device; measured once per process.

    All ranks measure at once, so that what devices share (memory bandwidth, clock rate) is shared as in training.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    return device.matmul_peak_flops(dtype, seconds=PEAK_SECONDS)
