"""Fetching a file in parts: what is there already is not fetched again, and what arrives is checked."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from services.api.documents import FileDocument

PARTIAL = 206


@dataclass
class Download:
    """One file on its way; it is called by its name only once it is whole and right."""

    document: FileDocument
    path: Path

    @classmethod
    def of(cls, document: FileDocument, folder: Path) -> "Download":
        """Into ``folder``. Raises ``ValueError`` for a name that leads out of it: a server is not to be trusted."""
        path = (folder / document.path).absolute()
        if folder.absolute() not in path.parents or ".." in Path(document.path).parts:
            raise ValueError(f"the service names a file {document.path!r}, which is none")
        path.parent.mkdir(parents=True, exist_ok=True)
        return cls(document, path)

    @property
    def draft(self) -> Path:
        """What has arrived."""
        return self.path.with_name(f"{self.path.name}.part")

    def done(self) -> bool:
        """Whether the file is there and right."""
        return self.path.is_file() and _sha256(self.path) == self.document.sha256

    def headers(self) -> dict[str, str]:
        """Of the request for the rest; the whole file is sent if it is another one by now."""
        have = self.draft.stat().st_size if self.draft.exists() else 0
        if not 0 < have < self.document.bytes:
            return {}
        return {"Range": f"bytes={have}-", "If-Range": f'"{self.document.sha256}"'}

    def open(self, status: int) -> BinaryIO:
        """Where the pieces of an answer with this status go."""
        return open(self.draft, "ab" if status == PARTIAL else "wb")

    def finish(self) -> None:
        """Everything has arrived. Raises ``OSError`` where it is not what was announced."""
        if _sha256(self.draft) != self.document.sha256:
            self.draft.unlink()
            raise OSError(f"{self.document.path} arrived damaged: fetch it again")
        self.draft.replace(self.path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
