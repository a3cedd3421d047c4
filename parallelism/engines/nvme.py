"""Offload of ZeRO-3's optimizer to a fast disk, for engine ``deepspeed``: what makes DeepSpeed's own swapping exact.

DeepSpeed's asynchronous I/O never looks at what became of a read or a write (``_do_io_complete`` in its
``csrc/aio/common/deepspeed_aio_common.cpp``): where the kernel refuses one, the numbers that lay in the buffer before
are taken for those of the file. Three things could be refused, and each is excluded here:

- A gradient that is read back into the middle of its sub-group's buffer lies at an address that direct I/O does not
  take, unless the sizes of all parameters before it happen to be multiples of 128. Hence every parameter is a sub-group
  of its own (``SUB_GROUP_ELEMENTS``): its gradient lies at the beginning.
- A file system or disk may ask for more than the 1024 bytes to which DeepSpeed aligns: :func:`prepare` tries.
- The disk may be full: the blocks of every file are reserved before the first step.

``python -m parallelism.engines.nvme`` compiles the I/O operator beforehand (minutes), as for an image of a container.
"""

import argparse
import ctypes
import fcntl
import importlib
import mmap
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import cpp_extension

from parallelism import agreement, device
from parallelism.engines import ready_deepspeed
from parallelism.memory import DISK_BYTES_PER_ELEMENT

SUB_GROUP_ELEMENTS = 1
"""DeepSpeed closes a sub-group of parameters when it holds so many elements: at once."""
BUFFERS = 4
"""Page-locked buffers, each of the largest partition: main weights, two moments, gradient."""
OPERATOR = {
    "block_size": 1 << 20,
    "queue_depth": 8,
    "single_submit": False,
    "overlap_events": True,
    "intra_op_parallelism": 1,
}
"""How the I/O operator is set up, for the trial as for DeepSpeed."""

FP32 = 4
ALIGNMENT = 1024
"""Bytes to which DeepSpeed aligns addresses, lengths and places in files."""
SMALLEST_ELEMENTS = (1 << 20) // FP32
"""DeepSpeed leaves a sub-group in memory that has fewer."""

Result = TypeVar("Result")
Moments = Callable[[torch.optim.Optimizer, Tensor], tuple[Tensor, Tensor]]

_PREFIX = "espalier-swap-"
_REMEDY = "or set layout.offload: cpu"


def settings(path: Path) -> dict[str, Any]:
    """DeepSpeed's ``offload_optimizer`` for a directory of this rank."""
    return {"device": "nvme", "nvme_path": str(path), "buffer_count": BUFFERS, "pin_memory": device.has_cuda()}


def prepare(root: str | Path, elements: int, largest: int) -> "SwapDirectory":
    """A directory under ``root`` in which this rank's state can be swapped. Collective.

    ``elements`` of float32 are swapped by this rank in all, ``largest`` at once. Raises ``ValueError`` on all ranks.
    """
    operator = on_all_ranks(load_operator)
    needed = _sum_over_host(elements * DISK_BYTES_PER_ELEMENT)
    return on_all_ranks(lambda: _checked_directory(root, operator, needed, largest))


def on_all_ranks(action: Callable[[], Result]) -> Result:
    """What ``action`` returns; raises ``ValueError`` on every rank where it fails on any. Collective."""
    results: list[Result] = []
    error = agreement.first_error(lambda: results.append(action()), (ValueError, OSError))
    if error:
        raise ValueError(error)
    return results[0]


def _sum_over_host(size: int) -> int:
    """Over the ranks of this host, which share its disk. Collective."""
    sizes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, (socket.gethostname(), size))
    return sum(size for host, size in sizes if host == socket.gethostname())


def _checked_directory(root: str | Path, operator: Any, needed: int, largest: int) -> "SwapDirectory":
    directory = SwapDirectory(root)
    _check_direct_io(directory.path, operator)
    _check_room(directory.path, needed)
    _check_lock(BUFFERS * (largest * FP32 + ALIGNMENT))
    return directory


def load_operator() -> Any:
    """DeepSpeed's I/O operator, compiled by the first process of this user on this host that asks (minutes).

    Raises ``ValueError`` naming what is missing for that.
    """
    builder = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder()
    if importlib.import_module("deepspeed.git_version_info").installed_ops.get(builder.name, False):
        return builder.load(verbose=False)
    directory = _build_directory()
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory), _build_environment(directory):
        _check_tools(builder)
        for left_behind in directory.glob("*/lock"):  # by a build that was killed: all others wait for our own lock
            left_behind.unlink()
        try:
            return builder.load(verbose=False)
        except (RuntimeError, ImportError) as error:
            raise ValueError(
                f"layout.offload nvme: DeepSpeed's I/O operator could not be compiled in {directory}: {error}; "
                f"repair that, {_REMEDY}"
            ) from error


def _build_directory() -> Path:
    """Ours alone, so that nobody else's lock is in it; one for each version, with which compiled code goes."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    kind = "cuda" if device.has_cuda() else "cpu"
    return Path(root) / "espalier" / f"{sys.implementation.cache_tag}-torch{torch.__version__}-{kind}"


@contextmanager
def _build_environment(directory: Path) -> Iterator[None]:
    """What torch's compiler driver reads: where to build, and where ``ninja`` lies if this environment has it alone."""
    before = {name: os.environ.get(name) for name in ("TORCH_EXTENSIONS_DIR", "PATH")}
    os.environ["TORCH_EXTENSIONS_DIR"] = str(directory)
    os.environ["PATH"] = os.pathsep.join([before["PATH"] or os.defpath, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _check_tools(builder: Any) -> None:
    missing = [] if shutil.which(cpp_extension.get_cxx_compiler()) else ["a C++ compiler (g++)"]
    if not cpp_extension.is_ninja_available():
        missing.append("ninja")
    if device.has_cuda() and cpp_extension.CUDA_HOME is None:
        missing.append("the CUDA toolkit (CUDA_HOME)")
    if not missing and not builder.is_compatible():
        missing.append("libaio with its headers (Debian: libaio-dev, Fedora: libaio-devel)")
    if missing:
        raise ValueError(
            f"layout.offload nvme: DeepSpeed's I/O operator is compiled at its first use, for which this host lacks "
            f"{' and '.join(missing)}; install that, {_REMEDY}"
        )


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Alone among the processes of this host; the kernel unlocks when a process ends, however it ends."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class SwapDirectory:
    """A directory of this process under ``root``, removed when this object or the process ends.

    What a killed process has left there is removed by the next one.
    """

    def __init__(self, root: str | Path) -> None:
        Path(root).mkdir(parents=True, exist_ok=True)
        with _locked(Path(root)):
            for path in Path(root).glob(f"{_PREFIX}*"):
                _remove_if_abandoned(path)
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
            self._alive = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self._alive, fcntl.LOCK_EX)
        # Not weakref.finalize: this one also runs where multiprocessing or a launcher ends the process.
        Finalize(self, _remove, args=(self.path, self._alive), exitpriority=1)


def _remove(path: Path, alive: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(alive)


def _remove_if_abandoned(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # removed since it was listed, or another user's
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:
        pass  # its process lives
    finally:
        os.close(handle)


def _check_room(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path).free
    if free < needed:
        raise ValueError(
            f"layout.offload_dir {path.parent}: {free / 2**30:.1f} GiB are free, and the ranks of this host need "
            f"{needed / 2**30:.1f} GiB; make room, name another directory, {_REMEDY}"
        )


def _check_lock(size: int) -> None:
    if not _can_lock(size):
        raise ValueError(
            f"layout.offload nvme: {size / 2**20:.0f} MiB of memory cannot be locked for I/O; raise the limit "
            f"(ulimit -l; of a container --ulimit memlock=-1), {_REMEDY}"
        )


def _can_lock(size: int) -> bool:
    """DeepSpeed aborts the process where it cannot."""
    libc = ctypes.CDLL(None)
    with mmap.mmap(-1, size) as memory:
        view = (ctypes.c_char * size).from_buffer(memory)
        address = ctypes.c_void_p(ctypes.addressof(view))
        locked = libc.mlock(address, ctypes.c_size_t(size)) == 0
        if locked:
            libc.munlock(address, ctypes.c_size_t(size))
        del view
    return locked


def _check_direct_io(path: Path, operator: Any) -> None:
    """Write and read as DeepSpeed will; raise ``ValueError`` where that does not give back what was written."""
    handle = operator.aio_handle(**OPERATOR)
    shift = ALIGNMENT // FP32
    memory = handle.new_cpu_locked_tensor(OPERATOR["block_size"] // FP32 + 2 * shift, torch.empty(0))
    pattern = torch.arange(memory.numel() - shift, dtype=torch.float32)
    part, file = memory[shift:], path / "trial"
    try:
        part.copy_(pattern)
        exact = _transfer(handle.async_pwrite, handle, part, file) and file.stat().st_size == part.nbytes
        part.zero_()
        exact = exact and _transfer(handle.async_pread, handle, part, file) and torch.equal(part, pattern)
    finally:
        handle.free_cpu_locked_tensor(memory)
    if not exact:
        raise ValueError(
            f"layout.offload_dir {path.parent}: direct I/O aligned to {ALIGNMENT} bytes does not work there; name a "
            f"directory on a local disk (ext4, xfs), {_REMEDY}"
        )
    file.unlink()


def _transfer(start: Any, handle: Any, tensor: Tensor, file: Path) -> bool:
    return start(tensor, str(file), 0) == 0 and handle.wait() == 1


class SwappedState:
    """Main weights and moments that DeepSpeed keeps on disk, and a copy of them in a mapped file.

    The copy is what checkpoints are written from, by a process beside the training, and read into. Pages of a mapped
    file can go back to the disk: nothing here needs memory for all parameters at once.
    """

    def __init__(self, optimizer: Any, path: Path, moments: Moments) -> None:
        """``moments`` gives the two of a main weight, made where there are none yet. Raises ``OSError``: disk full."""
        self._optimizer = optimizer
        self._moments = moments
        self._groups = [
            index for index in range(len(optimizer.fp16_groups)) if optimizer._swappable_optimizer_subgroup(index)
        ]
        sizes = [self._size(index) for index in self._groups]
        flat = _mapped(path, 3 * sum(sizes))
        parts = (part.view(3, -1).unbind() for part in flat.split([3 * size for size in sizes]))
        self.copy: dict[int, tuple[Tensor, ...]] = dict(zip(self._groups, parts, strict=True))
        """Main weights and moments by sub-group, flat, float32."""
        for index in self._groups:
            self._make_files(index)

    def _size(self, index: int) -> int:
        return int(self._optimizer.fp16_partitioned_groups_flat_numel[index])

    def _make_files(self, index: int) -> None:
        """Have DeepSpeed write everything that a step writes, and reserve the blocks, so that none can be missing."""
        main = self._optimizer.fp32_partitioned_groups_flat[index]
        swapper = self._optimizer.optimizer_swapper
        swapper.swap_out_gradients(main, [0], [torch.zeros(self._size(index))])
        with self._in_memory(index):
            pass
        info = swapper.swap_params_info[main.ds_id]
        lengths = dict.fromkeys(info.get_swap_paths(), self._size(index))
        lengths |= {gradient.path: gradient.length for gradient in info.swapped_gradients.values()}
        for path, length in lengths.items():
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, length * FP32)

    @contextmanager
    def _in_memory(self, index: int, *, write: bool = True) -> Iterator[tuple[Tensor, ...]]:
        """Main weights and moments of a sub-group as DeepSpeed has them; ``write``: they go back to the disk."""
        main = self._optimizer.fp32_partitioned_groups_flat[index]
        self._optimizer._optimizer_states_and_gradient_swap_in(index)
        yield (main.detach(), *self._moments(self._optimizer.optimizer, main))
        if write:
            self._optimizer._optimizer_states_and_gradient_swap_out(index)
        else:
            self._optimizer._release_swap_buffers(index)

    def refresh(self) -> None:
        """Make the copy what the disk holds."""
        for index, copies in self.copy.items():
            with self._in_memory(index, write=False) as held:
                for copy, tensor in zip(copies, held, strict=True):
                    copy.copy_(tensor)

    def write_back(self) -> None:
        """Make the disk hold what the copy is."""
        for index, copies in self.copy.items():
            with self._in_memory(index) as held:
                for copy, tensor in zip(copies, held, strict=True):
                    tensor.copy_(copy)


def _mapped(path: Path, elements: int) -> Tensor:
    """A float32 tensor [elements] in a nameless file under ``path``, whose blocks are reserved."""
    if not elements:
        return torch.empty(0)
    with tempfile.TemporaryFile(dir=path) as file:
        os.posix_fallocate(file.fileno(), 0, elements * FP32)
        memory = mmap.mmap(file.fileno(), elements * FP32)
    return torch.frombuffer(memory, dtype=torch.float32)


def main() -> int:
    """Compile DeepSpeed's I/O operator for this user and host, so that no job waits for it."""
    argparse.ArgumentParser(prog="python -m parallelism.engines.nvme", description=main.__doc__).parse_args()
    ready_deepspeed.load()
    try:
        load_operator()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
