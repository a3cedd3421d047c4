"""What a process group measures about itself: time, speed, memory."""

from functools import lru_cache

import torch
import torch.distributed as dist

from parallelism import agreement, device
from parallelism.budget import Burnt, Stopwatch

PEAK_SECONDS = 0.3
"""How long the matrix product that MFU is held against is timed."""


class Instruments:
    """Made when the group begins to burn; ``earlier`` is what earlier attempts burnt."""

    def __init__(self, earlier: Burnt, precision: str) -> None:
        self._stopwatch = Stopwatch(dist.get_world_size(), earlier)
        self._baseline_memory_bytes = device.peak_memory_bytes()
        # All ranks at once, so that what they share (memory bandwidth, turbo) is shared here as in training.
        self._group_peak_flops = dist.get_world_size() * _peak_flops(precision)

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
def _peak_flops(precision: str) -> float:
    """FLOP/s of a matrix product on one device; measured once per process."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    return device.matmul_peak_flops(dtype, seconds=PEAK_SECONDS)
