"""The project keeps its own rules: who may import what, no suppression lists, versions that agree."""

import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ROOMS = ("services", "launcher", "compression", "parallelism")

BLOCKED = ("torch", "megatron", "deepspeed", "transformers", "transformer_engine")
WORKING = ("ray", "mlflow", "matplotlib", "compressed_tensors", "safetensors")
"""What coordinators, workers and reports load, and nobody else."""

DESCRIBING = (
    "compression.config",
    "compression.frontier",
    "compression.recipe",
    "compression.registry",
    "parallelism.accounting",
    "parallelism.budget",
    "parallelism.checkpoint_store",
    "parallelism.data.config",
    "parallelism.data.prepared",
    "parallelism.data.sources",
    "parallelism.layout",
    "parallelism.models.base",
    "parallelism.models.gpt.config",
    "parallelism.options",
    "parallelism.presets",
    "parallelism.registry",
    "parallelism.result",
    "parallelism.rules",
    "parallelism.stop",
    "parallelism.training",
)
"""Modules of the two rooms on the right that only describe things."""


def modules_of(room: str) -> list[str]:
    """Dotted names of every module below a package."""
    found = pkgutil.walk_packages([str(ROOT / room)], prefix=f"{room}.")
    return [room, *(module.name for module in found if not module.name.endswith("__main__"))]


def test_services_launcher_and_descriptions_import_without_torch() -> None:
    modules = [*modules_of("services"), *modules_of("launcher"), *DESCRIBING]
    script = (
        "import sys, importlib\n"
        f"sys.modules.update(dict.fromkeys({BLOCKED!r}))\n"  # None in sys.modules makes an import fail
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr[-2000:]


def test_commands_and_api_need_none_of_what_only_work_needs() -> None:
    """They start at once, and fit into a small image."""
    script = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({(*BLOCKED, *WORKING)!r}))\n"
        "import services.cli, services.api.__main__, services.commands.serve\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]


def test_blocking_torch_really_blocks_it() -> None:
    script = "import sys; sys.modules['torch'] = None; import parallelism.device"
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    assert "torch" in ended.stderr


def test_import_contracts_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == EXIT_STATUS_SUCCESS


def test_import_contracts_cover_all_rooms() -> None:
    contracts = {contract["type"]: contract for contract in PYPROJECT["tool"]["importlinter"]["contracts"]}
    assert tuple(contracts["layers"]["layers"]) == ROOMS


def test_linters_have_no_suppression_lists() -> None:
    lint = PYPROJECT["tool"]["ruff"]["lint"]
    assert not {"ignore", "extend-ignore", "per-file-ignores", "extend-per-file-ignores"} & set(lint)
    assert not {"exclude", "extend-exclude"} & set(PYPROJECT["tool"]["ruff"])
    mypy = PYPROJECT["tool"]["mypy"]
    assert not {"exclude", "disable_error_code", "ignore_errors"} & set(mypy)
    for override in mypy["overrides"]:
        assert set(override) == {"module", "ignore_missing_imports"}
        assert not any(module.startswith(ROOMS) for module in override["module"])
    assert set(mypy["files"]) == set(ROOMS)


def test_every_dependency_is_pinned_for_make_install() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {_canonical(line.partition("==")[0]) for line in lines if "==" in line}
    needed = PYPROJECT["project"]["dependencies"] + PYPROJECT["project"]["optional-dependencies"]["dev"]
    names = {_canonical(re.split(r"[\[<>=~!; ]", requirement)[0]) for requirement in needed}
    assert names <= pinned


def test_makefile_installs_the_pinned_torch_first() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = re.search(r"^torch==(\S+)$", constraints, re.MULTILINE)
    assert pinned
    assert f"TORCH ?= torch=={pinned[1]}" in makefile
    assert makefile.index('install "$(TORCH)"') < makefile.index('install -e ".[dev]"')


def test_ci_runs_the_readme_s_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make test" in script.splitlines()
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_below_3_14_because_of_the_package_compression() -> None:
    assert PYPROJECT["project"]["requires-python"] == ">=3.11,<3.14"


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
