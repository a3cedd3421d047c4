"""The one place that knows whether CUDA exists: process groups, devices, and megatron-core on the CPU.

megatron-core names "cuda" throughout. On a machine without GPUs :func:`connect` adapts it in the calling thread:
tensors asked for on "cuda" are made on the CPU, ``Tensor.cuda()`` is the identity, and the CUDA random state is the
CPU's. On GPUs without Transformer Engine and apex it gets multi-tensor kernels for what it would do tensor by tensor.
"""

import ctypes
import logging
import os
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import lru_cache, wraps
from importlib import import_module
from typing import Any

import megatron.core.optimizer.clip_grads as megatron_clipping
import megatron.core.optimizer.optimizer as megatron_optimizer
import megatron.core.tensor_parallel.random as megatron_random
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _CudaMeansCpu(TorchFunctionMode):
    """Carries out on the CPU what is asked of "cuda"."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizers sort parameters by comparing this string with "torch.cuda.FloatTensor".
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


def has_cuda() -> bool:
    """Whether ranks run on GPUs."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """This rank's device."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def host_store(address: str = "127.0.0.1", timeout_seconds: float = 600.0) -> dist.TCPStore:
    """A rendezvous store on a free port of this host; its ``port`` is what the other ranks connect to."""
    timeout = timedelta(seconds=timeout_seconds)
    return dist.TCPStore(address, 0, is_master=True, timeout=timeout, wait_for_workers=False)


def connect(
    rank: int,
    world_size: int,
    address: str,
    port: int,
    *,
    threads: int = 1,
    timeout_seconds: float = 600.0,
    local_rank: int | None = None,
    store: dist.Store | None = None,
) -> None:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and make megatron-core run on this device.

    ``store`` is given by the rank that hosts the rendezvous (:func:`host_store`); without it rank 0 hosts at ``port``.
    """
    timeout = timedelta(seconds=timeout_seconds)
    torch.set_num_threads(threads)
    if has_cuda():
        torch.cuda.set_device(rank % torch.cuda.device_count() if local_rank is None else local_rank)
        compute_reproducibly()
        adapt_megatron_to_gpu()
    else:
        adapt_megatron_to_cpu()
    if store is None:
        store = dist.TCPStore(address, port, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
    # Without device_id: with it NCCL would connect every one of megatron-core's groups at once, some 170 MB for each.
    backend = "nccl" if has_cuda() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def disconnect() -> None:
    """Leave the process group and forget megatron's groups."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def adapt_megatron_to_cpu() -> None:
    """Redirect CUDA calls of this thread to the CPU; calling it again changes nothing."""
    if any(isinstance(mode, _CudaMeansCpu) for mode in torch.overrides._get_current_function_mode_stack()):
        return
    _CudaMeansCpu().__enter__()
    cpu = torch.device("cpu")
    replacements: dict[str, Any] = {
        "current_device": lambda: cpu,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "get_rng_state": lambda *_, **__: torch.random.get_rng_state(),
        "manual_seed": torch.manual_seed,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.random.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.random.set_rng_state(state)
    # It warns at every dropout that the CPU's random state is not left alone: here it is the one that is forked.
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)


def compute_reproducibly() -> None:
    """Choose kernels that give the same bits every time, on which resuming bit for bit depends.

    The backward pass of attention adds in any order otherwise, also where torch is only asked to warn. An operation
    that has no such kernel raises ``RuntimeError``.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")  # the same for Transformer Engine's attention
    torch.use_deterministic_algorithms(True)
    # That would also fill new memory, which is for finding reads of what nobody wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def adapt_megatron_to_gpu() -> None:
    """Give megatron-core multi-tensor kernels where neither Transformer Engine nor apex provides them.

    Its own substitutes launch a kernel per tensor, and wait for the GPU once per tensor to learn its norm.
    """
    if not megatron_clipping.l2_norm_impl.__name__.startswith("local_"):
        return
    megatron_clipping.l2_norm_impl = _l2_norm
    megatron_clipping.multi_tensor_scale_impl = _scale
    megatron_optimizer._multi_tensor_copy_this_to_that = _copy


def _l2_norm(chunk: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], *_: Any) -> tuple[Tensor, None]:
    """The norm [1] over all tensors of the one list."""
    (tensors,) = lists
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))), dtype=torch.float32).view(1), None


def _scale(chunk: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], factor: float) -> None:
    """Multiply in place; megatron-core passes the same list as source and target."""
    sources, targets = lists
    assert sources is targets
    torch._foreach_mul_(list(targets), factor)


def _copy(this: Sequence[Tensor], that: Sequence[Tensor], overflow_buf: Tensor | None = None) -> None:
    """``that`` = ``this``, of any precision."""
    if this:
        torch._foreach_copy_(list(that), list(this))


def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a chain of elementwise operations into one kernel on GPUs; on CPUs the function stays as it is.

    The first argument is a tensor. Where the compiler does not work (no C compiler on the machine, say) the function
    runs uncompiled, slower and with the same result up to rounding.
    """

    @wraps(function)
    def call(first: Tensor, *rest: Any) -> Tensor:
        return _compiled(function)(first, *rest) if first.is_cuda else function(first, *rest)

    return call


@lru_cache(maxsize=64)
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    compiled = torch.compile(function, dynamic=False)
    broken = False

    def call(*arguments: Any) -> Tensor:
        nonlocal broken
        if not broken:
            try:
                result: Tensor = compiled(*arguments)
                return result
            except (torch._dynamo.exc.TorchDynamoException, OSError) as error:
                broken = True
                warnings.warn(f"{function.__name__} runs uncompiled: {error}", RuntimeWarning, stacklevel=2)
        return function(*arguments)

    return call


def matmul_peak_flops(dtype: torch.dtype = torch.float32, size: int = 0, seconds: float = 0.5) -> float:
    """Measured FLOP/s of a large square matrix product on this device: the denominator of MFU."""
    size = size or (8192 if has_cuda() else 1024)
    left, right = (torch.randn(size, size, device=device(), dtype=dtype) for _ in range(2))
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or best == 0.0:
        start = time.perf_counter()
        left @ right
        torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def die_with_parent(parent: int) -> None:
    """Have the kernel end this forked process when the process ``parent`` ends, however it ends (Linux)."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the request
        os._exit(1)


def baseline_memory_bytes() -> int:
    """What this rank holds before it has a model; on GPUs :func:`peak_memory_bytes` starts anew from here."""
    import_module("torch._dynamo")  # torch's optimizers load it when they are made; it is no part of the model's memory
    if has_cuda():
        torch.cuda.reset_peak_memory_stats()
    return peak_memory_bytes()


def peak_memory_bytes() -> int:
    """Peak memory of this rank so far: the allocator's on GPUs, resident set (VmHWM) on CPUs."""
    if has_cuda():
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
