"""megatron-core's decorator for fused functions: torch's compiler is loaded only where there is a GPU."""

import subprocess
import sys

import pytest
import torch

from parallelism import fusing


def _double(value: float) -> float:
    return 2 * value


def test_a_rank_on_cpus_does_not_load_the_compiler() -> None:
    script = (
        "import sys, torch, parallelism.run\n"
        "from megatron.core.fusions import fused_bias_swiglu\n"
        "print(torch.cuda.is_available(), 'torch._inductor.compile_fx' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    gpus, loaded = ended.stdout.split()[-2:]
    assert gpus == loaded


def test_functions_are_compiled_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fusing.fuse(_double) is _double
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda function: ("compiled", function))
    assert fusing.fuse(_double) == ("compiled", _double)


def test_megatron_core_that_is_imported_already_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = object()
    monkeypatch.setitem(sys.modules, fusing.NAME, imported)
    fusing.install()
    assert sys.modules[fusing.NAME] is imported
