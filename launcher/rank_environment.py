"""Environment variables that a job may set for its ranks: how they talk to each other, and nothing else. Torch-free.

Variables that name a file or a library are not among them: they would let a job write files, or run code, where it may
not.
"""

import re
from typing import Annotated

from pydantic import AfterValidator

from parallelism.suggest import remedy

ALLOWED = (
    "GLOO_SOCKET_IFNAME",
    "NCCL_ALGO",
    "NCCL_BUFFSIZE",
    "NCCL_CROSS_NIC",
    "NCCL_CUMEM_ENABLE",
    "NCCL_DEBUG",
    "NCCL_DEBUG_SUBSYS",
    "NCCL_IB_DISABLE",
    "NCCL_IB_GID_INDEX",
    "NCCL_IB_HCA",
    "NCCL_IB_PCI_RELAXED_ORDERING",
    "NCCL_IB_QPS_PER_CONNECTION",
    "NCCL_IB_RETRY_CNT",
    "NCCL_IB_SL",
    "NCCL_IB_TC",
    "NCCL_IB_TIMEOUT",
    "NCCL_MAX_NCHANNELS",
    "NCCL_MIN_NCHANNELS",
    "NCCL_NET_GDR_LEVEL",
    "NCCL_NET_GDR_READ",
    "NCCL_NVLS_ENABLE",
    "NCCL_P2P_DISABLE",
    "NCCL_P2P_LEVEL",
    "NCCL_PROTO",
    "NCCL_SHM_DISABLE",
    "NCCL_SOCKET_FAMILY",
    "NCCL_SOCKET_IFNAME",
    "NCCL_SOCKET_NTHREADS",
    "NCCL_NSOCKS_PERTHREAD",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "TORCH_NCCL_BLOCKING_WAIT",
)
VALUE = re.compile(r"[A-Za-z0-9_.,:=^-]{1,200}")


def _allowed(variables: dict[str, str]) -> dict[str, str]:
    for name, value in variables.items():
        if name not in ALLOWED:
            raise ValueError(
                f"{name} may not be set by a job: {remedy(name, ALLOWED)}; operators set others in profiles"
            )
        if VALUE.fullmatch(value) is None:
            raise ValueError(
                f"{name}: {value!r} is no value for it: letters, digits and _.,:=^- are, up to 200 of them"
            )
    return variables


RankEnvironment = Annotated[dict[str, str], AfterValidator(_allowed)]
"""Name → value, of :data:`ALLOWED` names."""
