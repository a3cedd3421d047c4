"""What the engines ``lean`` and ``deepspeed`` cannot do, said before anything starts. Torch-free."""

from parallelism.layout import Layout
from parallelism.training import TrainingConfig

LARGEST_BFLOAT16_BETA = 0.99
"""bfloat16 has eight significant bits: a moment whose β is nearer to 1 rounds back to itself and never decays."""


def check(layout: Layout, training: TrainingConfig) -> None:
    """Raise ``ValueError`` naming the field, its value and a remedy; ``training`` holds no ``auto``."""
    if layout.engine == "lean":
        _check_lean(layout, training)
    if layout.engine == "deepspeed":
        _check_deepspeed(layout, training)


def _check_lean(layout: Layout, training: TrainingConfig) -> None:
    if training.precision != "fp32":
        raise ValueError(
            f"training.precision {training.precision}: engine lean keeps float32 weights as their own master copy; "
            "set training.precision: fp32"
        )
    if training.micro_batch * layout.data != training.global_batch:
        raise ValueError(
            f"training.micro_batch {training.micro_batch}: engine lean has no gradient accumulation, so that "
            f"micro_batch × data {layout.data} must be global_batch {training.global_batch}; set "
            f"training.global_batch: {training.micro_batch * layout.data}, or choose another engine"
        )
    for name, beta in (("beta1", training.beta1), ("beta2", training.beta2)):
        if beta > LARGEST_BFLOAT16_BETA:
            raise ValueError(
                f"training.{name} {beta}: engine lean keeps bfloat16 moments, which stop decaying above "
                f"{LARGEST_BFLOAT16_BETA}; lower training.{name} or choose another engine"
            )


def _check_deepspeed(layout: Layout, training: TrainingConfig) -> None:
    if layout.offload == "nvme" and layout.zero_stage != 3:
        raise ValueError(
            f"layout.zero_stage {layout.zero_stage}: DeepSpeed keeps the optimizer on a disk with ZeRO-3 only; set "
            "layout.zero_stage: 3, or layout.offload: cpu"
        )
    if training.prune is not None:
        raise ValueError("training.prune: engine deepspeed does not prune; set layout.engine: megatron, or lean")
    if layout.offload != "none" and layout.zero_stage == 0:
        raise ValueError(
            f"layout.offload {layout.offload}: DeepSpeed moves what ZeRO has partitioned; set layout.zero_stage: 1, 2 "
            "or 3, or layout.offload: none"
        )
    if layout.zero_stage == 0 and training.precision == "bf16":
        raise ValueError(
            "layout.zero_stage 0: DeepSpeed without ZeRO keeps no float32 master copy of bfloat16 weights; set "
            "layout.zero_stage: 1, training.precision: fp32, or engine: megatron"
        )
    assert isinstance(training.global_batch, int)
    assert isinstance(training.micro_batch, int)
    if training.global_batch % (training.micro_batch * layout.data):
        raise ValueError(
            f"training.global_batch {training.global_batch} is not a multiple of micro_batch {training.micro_batch} × "
            f"data {layout.data}; set training.global_batch: {training.micro_batch * layout.data}"
        )
