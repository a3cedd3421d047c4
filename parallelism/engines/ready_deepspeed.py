"""DeepSpeed, imported so that it guesses nothing about the machine."""

import importlib
import logging
import os
import warnings
from typing import Any

from parallelism import device


def load() -> Any:
    """The package, told what it otherwise guesses from the machine; it reads the environment when it is imported."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.has_cuda() else "cpu")
    os.environ.setdefault("DS_BUILD_OPS", "0")
    os.environ.setdefault("LOCAL_RANK", str(device.device().index or 0))
    # Else it runs `numactl` on CPUs, once for every bucket of gradients, to count devices; nothing depends on that.
    os.environ.setdefault("LOCAL_SIZE", "1")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # at each of its steps
    # Its collectives over shared memory would be compiled at run time, and reach the ranks of one host only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
