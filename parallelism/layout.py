"""How a model is spread over devices. Torch-free."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from parallelism.options import Options

DeviceKind = Literal["cpu", "gpu"]


class Layout(Options):
    """Tensor × pipeline × data parallelism, with the engine that carries it out.

    A device is a GPU, or on CPUs one rank with a stated number of threads.
    """

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    data: PositiveInt = 1
    virtual_pipeline: PositiveInt = Field(default=1, description="model chunks per pipeline stage (interleaved 1F1B)")
    sequence_parallel: bool = False
    engine: str = Field(default="megatron", description="a name in parallelism.registry.ENGINES")
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "cpu", "nvme"] = "none"
    offload_dir: str | None = Field(default=None, description="directory for offload: nvme")

    @property
    def world_size(self) -> int:
        """Number of devices (ranks) the layout occupies."""
        return self.tensor * self.pipeline * self.data

    @model_validator(mode="after")
    def _consistent(self) -> "Layout":
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError("virtual_pipeline > 1 needs pipeline > 1: leave virtual_pipeline out or raise pipeline")
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("sequence_parallel needs tensor > 1: leave sequence_parallel out or raise tensor")
        if self.engine != "deepspeed" and (self.zero_stage or self.offload != "none"):
            raise ValueError("zero_stage and offload need engine: deepspeed")
        if self.engine == "deepspeed" and self.pipeline > 1:
            raise ValueError("engine deepspeed has no pipeline parallelism: set pipeline: 1 or engine: megatron")
        if self.engine == "lean" and self.pipeline > 1:
            raise ValueError("engine lean has no pipeline parallelism: set pipeline: 1 or engine: megatron")
        if self.offload == "nvme" and not self.offload_dir:
            raise ValueError("offload: nvme needs offload_dir: a directory on the fast disk")
        return self

    def __str__(self) -> str:
        text = f"T{self.tensor}×P{self.pipeline}×D{self.data}"
        if self.virtual_pipeline > 1:
            text += f"×V{self.virtual_pipeline}"
        if self.zero_stage:
            text += f" ZeRO-{self.zero_stage}"
        return text if self.engine == "megatron" else f"{text} {self.engine}"


def layout_text(document: Mapping[str, Any] | None) -> str:
    """A layout in a document as people read it, ``T2×P1×D1``; empty where there is none."""
    return str(Layout.model_validate(document)) if document else ""


def stage_layers(layers: int, pipeline: int) -> list[int]:
    """Layers per pipeline stage: they differ by at most one, and the first stages take the extra ones."""
    base, extra = divmod(layers, pipeline)
    return [base + (stage < extra) for stage in range(pipeline)]
