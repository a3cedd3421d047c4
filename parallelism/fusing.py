"""Keeps torch's compiler out of processes that never compile: it takes more than a second of every one's start.

megatron-core decorates some thirty functions with ``torch.compile`` when it is imported, which loads the whole
compiler; on CPUs none of them runs compiled. Its module ``megatron.core.jit``, which only chooses the decorator, is
therefore replaced by one whose decorator asks for a GPU first.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

NAME = "megatron.core.jit"


def install() -> None:
    """Take the place of ``megatron.core.jit`` unless megatron-core has been imported; torch is not imported here."""
    if NAME not in sys.modules:
        module = ModuleType(NAME, __doc__)
        module.__dict__.update(jit_fuser=fuse, noop_decorator=leave)
        sys.modules[NAME] = module


def fuse(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled where it may run on a GPU, else as it is."""
    import torch

    return torch.compile(function) if torch.cuda.is_available() else function


def leave(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it is."""
    return function
