"""Where training text comes from and how it becomes tokens. Torch-free."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from parallelism.options import Options

BUILTIN_PREFIX = "builtin:"
BUILTIN_CORPORA = ("python-stdlib",)

NonEmptyStr = Annotated[str, Field(min_length=1)]


class TokenizerConfig(Options):
    """A byte-pair encoding trained on the training split, raw bytes, or a given ``tokenizer.json``."""

    kind: Literal["bpe", "bytes", "file"] = "bpe"
    vocab_size: int | None = Field(default=None, ge=257, le=1_000_000, description="bpe only; default 4096")
    path: NonEmptyStr | None = Field(default=None, description="file only: a tokenizer.json")
    end_of_document: NonEmptyStr | None = Field(
        default=None, description="file only: the token between documents; default: the well-known one it has"
    )
    training_bytes: PositiveInt = Field(
        default=20_000_000, description="bpe only: bytes of text the merges are learnt from"
    )

    @model_validator(mode="after")
    def _fields_match_kind(self) -> "TokenizerConfig":
        if self.kind == "file" and not self.path:
            raise ValueError("tokenizer kind: file needs path: a tokenizer.json")
        if self.kind != "file" and self.path:
            raise ValueError(f"tokenizer path goes with kind: file, not kind: {self.kind}")
        if self.kind != "file" and self.end_of_document:
            raise ValueError(f"tokenizer end_of_document goes with kind: file, not kind: {self.kind}")
        if self.kind != "bpe" and self.vocab_size is not None:
            raise ValueError(f"tokenizer vocab_size goes with kind: bpe, not kind: {self.kind}")
        return self


class DataConfig(Options):
    """The data of one job; every candidate sees the same tokens in the same order."""

    kind: Literal["text", "jsonl", "parquet", "pairs", "parallel"] = "text"
    train: list[NonEmptyStr] = Field(
        min_length=1, description="paths, globs, fsspec URLs (.gz, .zst too), builtin:NAME"
    )
    validation: float | list[NonEmptyStr] = Field(default=0.02, description="held-out fraction of documents, or paths")
    field: NonEmptyStr = Field(default="text", description="jsonl and parquet: where a document's text stands")
    documents: Literal["auto", "file", "article", "passage", "line"] = Field(
        default="auto", description="text only: what one document is (see parallelism.data.readers)"
    )
    tokenizer: TokenizerConfig = TokenizerConfig()
    sequence_length: int = Field(default=256, ge=8)

    @model_validator(mode="after")
    def _held_out_fraction(self) -> "DataConfig":
        if isinstance(self.validation, float) and not 0.0 < self.validation < 1.0:
            raise ValueError(f"validation {self.validation} is not a fraction between 0 and 1, nor a list of paths")
        if isinstance(self.validation, list) and not self.validation:
            raise ValueError("validation is an empty list: name files, or give a fraction such as 0.02")
        for path in self.train + (self.validation if isinstance(self.validation, list) else []):
            name = path.removeprefix(BUILTIN_PREFIX)
            if name != path and name not in BUILTIN_CORPORA:
                raise ValueError(f"unknown built-in corpus {name!r}: available is {', '.join(BUILTIN_CORPORA)}")
        return self

    @model_validator(mode="after")
    def _fields_match_kind(self) -> "DataConfig":
        if self.kind != "text" and self.documents != "auto":
            raise ValueError(f"documents goes with kind: text, not kind: {self.kind}")
        builtin = [path for path in self.train if path.startswith(BUILTIN_PREFIX)]
        if builtin and self.kind != "text":
            raise ValueError(f"{builtin[0]} is plain text: it goes with kind: text, not kind: {self.kind}")
        return self
