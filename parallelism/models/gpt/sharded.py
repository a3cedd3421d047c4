"""Family ``gpt`` on megatron-core: protocol :class:`parallelism.models.base.ShardedFamily`."""

import importlib.util
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from parallelism.device import has_cuda
from parallelism.layout import Layout, stage_layers
from parallelism.models.base import Batch
from parallelism.models.gpt.attention import CausalAttention
from parallelism.models.gpt.config import GPTConfig
from parallelism.models.gpt.gate import SwiGLU
from parallelism.models.gpt.loss import cross_entropy
from parallelism.models.gpt.norm import Norm
from parallelism.training import TrainingConfig
from parallelism.vocabulary import hide_padding


def transformer_config(config: GPTConfig, layout: Layout, training: TrainingConfig) -> TransformerConfig:
    """The megatron-core configuration of this model at this layout; ``training.precision`` must be resolved."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[training.precision]
    gated_by_hand = config.gated and not _uses_transformer_engine()
    return TransformerConfig(
        num_layers=config.layers,
        hidden_size=config.hidden,
        num_attention_heads=config.heads,
        num_query_groups=config.query_groups,
        kv_channels=config.channels,
        ffn_hidden_size=config.feed_forward,
        normalization="LayerNorm" if config.style == "gpt2" else "RMSNorm",
        layernorm_epsilon=config.norm_epsilon,
        activation_func=_activation(config),
        gated_linear_unit=config.gated,
        add_bias_linear=config.bias,
        hidden_dropout=config.dropout,
        attention_dropout=config.dropout,
        init_method_std=config.initializer_std,
        # Weights come from parallelism.initialize, so that every layout starts from the same ones.
        perform_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=training.precision == "bf16",
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        pipeline_model_parallel_layout=_uneven_stages(config, layout),
        # With two stages, batched sends of activations and of gradients between the same two ranks would be mixed up.
        overlap_p2p_comm=layout.virtual_pipeline > 1,
        batch_p2p_comm=layout.virtual_pipeline == 1,
        sequence_parallel=layout.sequence_parallel,
        recompute_granularity="full" if training.recompute else None,
        recompute_method="uniform" if training.recompute else None,
        recompute_num_layers=1 if training.recompute else None,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=has_cuda() and (config.bias or config.dropout > 0.0),
        # For GELU megatron-core's fused kernel has the tanh approximation, whatever the function asked for.
        bias_activation_fusion=has_cuda() and config.gated and not gated_by_hand,
        use_te_activation_func=gated_by_hand,  # only megatron-core's name for an activation given by the layer's spec
        apply_rope_fusion=False,
    )


def build(
    config: GPTConfig, megatron: TransformerConfig, *, first: bool, last: bool, chunk: int | None
) -> torch.nn.Module:
    """One pipeline chunk with uninitialised weights."""
    local = not _uses_transformer_engine()
    learned = config.style == "gpt2"
    model = _Model(
        megatron,
        _local_spec(config, megatron, chunk) if local else get_gpt_layer_with_transformer_engine_spec(),
        vocab_size=config.padded_vocab_size,
        max_sequence_length=config.context,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=config.tied_embeddings,
        # Rotary positions are applied by our own core attention, where that is used.
        position_embedding_type="learned_absolute" if learned else "none" if local else "rope",
        rotary_base=config.rope_base,
        vp_stage=chunk,
    )
    model.real_vocab_size = config.vocab_size
    # megatron-core makes its matrices where they belong (or on "meta", to be looked at only), word embeddings first;
    # norms and positions start as float32 on the CPU.
    place = next(parameter.device for parameter in model.parameters() if parameter.ndim == 2)
    return model.to(device=place, dtype=megatron.params_dtype)


def collate(rows: np.ndarray) -> Batch:
    """Token ids [B, S + 1] → ``tokens`` [B, S] and the ``labels`` [B, S] that follow them."""
    ids = torch.from_numpy(np.ascontiguousarray(rows))
    return {"tokens": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


def logits(module: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Logits [B, S, vocabulary / tensor] on the last stage; activations [S, B, hidden] before it."""
    output: torch.Tensor = module(batch["tokens"], _positions(batch["tokens"]), None)
    return output


def losses(module: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy of every next token [B, S] float32 on the last stage; activations [S, B, hidden] before it."""
    output: torch.Tensor = module(batch["tokens"], _positions(batch["tokens"]), None, labels=batch["labels"])
    return output


def _positions(tokens: torch.Tensor) -> torch.Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


class _Model(GPTModel):
    """megatron-core's model with the loss of the real vocabulary, and on GPUs with our kernels for it."""

    real_vocab_size: int

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Labels [B, S] and logits [S, B, vocabulary / tensor] → losses [B, S] float32."""
        hide_padding(logits, self.real_vocab_size)
        if not logits.is_cuda:
            loss: torch.Tensor = super().compute_language_model_loss(labels, logits)
            return loss
        return cross_entropy(logits, labels.transpose(0, 1).contiguous()).transpose(0, 1).contiguous()


def _activation(config: GPTConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """Between the matrices of the feed-forward block."""
    if config.gated:
        return torch.nn.functional.silu
    return partial(torch.nn.functional.gelu, approximate=config.gelu_approximation)


def _uses_transformer_engine() -> bool:
    return has_cuda() and importlib.util.find_spec("transformer_engine") is not None


def _local_spec(config: GPTConfig, megatron: TransformerConfig, chunk: int | None) -> TransformerBlockSubmodules:
    """megatron-core's layers in plain torch, with our attention, norms and gate."""
    layer = get_gpt_layer_local_spec(normalization=megatron.normalization)
    parts = layer.submodules
    rotary_base = config.rope_base if config.style == "llama" else None
    parts.self_attention.submodules.core_attention = ModuleSpec(CausalAttention, params={"rotary_base": rotary_base})
    parts.input_layernorm = parts.pre_mlp_layernorm = Norm
    parts.mlp.submodules.activation_func = SwiGLU if config.gated else None
    count = get_num_layers_to_build(megatron, vp_stage=chunk)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=Norm)


def _uneven_stages(config: GPTConfig, layout: Layout) -> list[list[str]] | None:
    """Stages by name where the layers do not divide evenly; megatron-core splits even ones by itself."""
    chunks = layout.pipeline * layout.virtual_pipeline
    if config.layers % chunks == 0:
        return None
    stages = [["decoder"] * count for count in stage_layers(config.layers, chunks)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages
