"""The secrets of docker-compose.yml, made once: ``python3 deploy/compose/make_secrets.py [FOLDER]``. No other packages.

What is there already stays. Containers run as another user than yours and have to read these files; the folder keeps
everybody else out.
"""

import secrets
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "secrets"


def make(folder: Path) -> list[str]:
    """Write the files that are missing; their names."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    password = _kept(folder / "postgres-password") or secrets.token_hex(24)
    store = f"espalier{secrets.token_hex(4)}", secrets.token_hex(24)
    texts = {
        "postgres-password": password,
        "pgpass": f"postgres:5432:*:espalier:{password}",
        "ray-token": secrets.token_hex(32),
        "admin-key": f"esp_{secrets.token_hex(6)}_{secrets.token_urlsafe(32)}",
        "object-store-root": f"export ROOT_ACCESS_KEY={store[0]} ROOT_SECRET_KEY={store[1]}",
        "object-store-credentials": f"[default]\naws_access_key_id = {store[0]}\naws_secret_access_key = {store[1]}",
    }
    missing = [name for name in texts if not (folder / name).exists()]
    if any("object-store" in name for name in missing):  # they belong together
        missing = [name for name in texts if name in missing or "object-store" in name]
    for name in missing:
        (folder / name).write_text(f"{texts[name]}\n", encoding="ascii")
        (folder / name).chmod(0o644)
    return missing


def _kept(path: Path) -> str | None:
    return path.read_text(encoding="ascii").strip() if path.exists() else None


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    made = make(target)
    print(f"{target}: {', '.join(made) or 'everything was there'}")
