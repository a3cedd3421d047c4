"""What prepared data is: the manifest that :mod:`parallelism.data.prepare` writes last. Torch-free."""

import os
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from parallelism import places
from parallelism.options import Options

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


class SplitFacts(Options):
    """One split. ``tokens`` includes one end-of-document token per document; ``bytes`` is UTF-8 text without them."""

    documents: PositiveInt
    tokens: PositiveInt
    bytes: PositiveInt
    sha256: str

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token."""
        return self.bytes / self.tokens


class PreparedData(Options):
    """A job's tokens on disk, and the facts about them.

    ``request`` hashes what was asked for, ``corpus`` the documents that were read. ``folder`` is the subfolder of the
    directory that holds the files; ``files`` lists them with their sizes.
    """

    model_config = ConfigDict(extra="ignore")

    version: Literal[1] = 1
    request: str
    corpus: str
    seed: NonNegativeInt
    folder: str
    files: dict[str, int]
    vocab_size: PositiveInt
    end_of_document: str
    end_of_document_id: NonNegativeInt
    splits: dict[Split, SplitFacts]
    input_files: PositiveInt
    input_bytes: NonNegativeInt
    seconds: float
    created: str
    directory: Path = Path()

    @classmethod
    def load(cls, directory: Path | str) -> "PreparedData":
        """Read the manifest in ``directory``.

        Raises ``ValueError`` where there is no complete set of prepared data.
        """
        directory = places.need(directory)
        path = directory / MANIFEST
        try:
            prepared = cls.model_validate_json(path.read_bytes()).model_copy(update={"directory": directory})
        except FileNotFoundError as error:
            raise ValueError(f"{directory} holds no prepared data ({MANIFEST} is missing): prepare it first") from error
        except ValidationError as error:
            raise ValueError(
                f"{path} is not a manifest of prepared data: {error}; delete it and prepare again"
            ) from error
        prepared._check_files()
        return prepared

    def _check_files(self) -> None:
        for name, size in self.files.items():
            path = self.directory / self.folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise ValueError(f"{path} is missing or not {size} bytes long: prepare the data again")

    @property
    def tokenizer_path(self) -> Path:
        """The ``tokenizer.json``."""
        return self.directory / self.folder / TOKENIZER

    def prefix(self, split: Split) -> Path:
        """What megatron-core's ``IndexedDataset`` calls the path prefix of a split."""
        return self.directory / self.folder / split

    @property
    def train(self) -> SplitFacts:
        """The training split."""
        return self.splits["train"]

    @property
    def validation(self) -> SplitFacts:
        """The held-out split."""
        return self.splits["validation"]

    @property
    def bytes_per_token(self) -> float:
        """Of the held-out split: nats per token / ln 2 / this = bits per byte."""
        return self.validation.bytes_per_token

    def write(self) -> None:
        """Make the data true: write the manifest under another name, then rename it."""
        temporary = self.directory / f"{MANIFEST}.{self.folder}"
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(self.model_dump_json(indent=2, exclude={"directory"}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.directory / MANIFEST)
