"""The base of every options model: frozen, strict about unknown fields, free of torch."""

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """Immutable options that refuse fields they do not know and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
