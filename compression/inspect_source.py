"""What lies at a path, as JSON: ``python -m compression.inspect_source PATH``, for processes that do not import torch.

Prints ``{"model", "fingerprint", "tokenizer"}``, or ``{"error"}`` with exit code 2 where it is no model that can be
compressed.
"""

import json
import sys
from pathlib import Path
from typing import Any

from compression.source import find_tokenizer, read_source


def inspect(path: str) -> dict[str, Any]:
    """The model's shape, what identifies its weights, and its tokenizer's file, if there is one."""
    source = read_source(path)
    try:
        tokenizer: str | None = str(find_tokenizer(path)) if Path(path).is_dir() else None
    except ValueError:
        tokenizer = None
    return {
        "model": source.config.model_dump(mode="json"),
        "fingerprint": source.fingerprint,
        "tokenizer": tokenizer,
    }


def main() -> int:
    """Entry point."""
    try:
        print(json.dumps(inspect(sys.argv[1])))
    except ValueError as error:
        print(json.dumps({"error": str(error)}))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
