"""What an image installs, from the project's list: ``python requirements.py pyproject.toml api|worker [EXTRA ...]``.

The API answers, checks and plans, but works on nothing: what only work needs is left out of its image. That the API
does without it is tested (``tests/test_project.py``).
"""

import re
import sys
import tomllib
from pathlib import Path

ONLY_FOR_WORK = {
    "compressed-tensors",
    "deepspeed",
    "megatron-core",
    "mlflow",
    "ray",
    "safetensors",
    "torch",
    "transformers",
}
"""Matplotlib stays: the API draws a frontier where nobody has drawn it yet."""


def requirements(pyproject: Path, image: str, extras: list[str]) -> list[str]:
    """Requirements as pip takes them."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    rows = [*project["dependencies"], *(row for extra in extras for row in project["optional-dependencies"][extra])]
    left_out = ONLY_FOR_WORK if image == "api" else set()
    return [row for row in rows if re.split(r"[\[<>=!~ ]", row, maxsplit=1)[0] not in left_out]


if __name__ == "__main__":
    print("\n".join(requirements(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])))
