"""One optimizer step of an engine, and one of Transformers' Llama of the same shape, for benchmarks of both."""

from collections.abc import Callable
from typing import Any

Step = Callable[[Any], float]
"""Token ids [sequences, tokens + 1] → the step's loss."""


def engine_step(engine: Any, micro_batch: int, learning_rate: float) -> Step:
    """A step of one of Espalier's engines on one rank."""
    from parallelism.models.gpt.sharded import collate

    def step(ids: Any) -> float:
        parts = [collate(ids[begin : begin + micro_batch]) for begin in range(0, len(ids), micro_batch)]
        return float(engine.train_step(parts, learning_rate).loss)

    return step


def transformers_step(
    shape: dict[str, int], vocabulary: int, length: int, micro_batch: int, learning_rate: float, dtype: Any
) -> tuple[Step, int]:
    """The same with Transformers' Llama on torch's scaled dot product attention and fused AdamW; and its parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from parallelism.device import device

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape["hidden"],
        intermediate_size=shape["ffn_hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=length,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with device():
        model = LlamaForCausalLM(config).to(dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(ids: Any) -> float:
        tokens = torch.from_numpy(ids[:, :-1]).to(device())
        total = torch.zeros((), device=device())
        for part in tokens.split(micro_batch):
            # The model shifts the labels itself; one position in `length` fewer is of no account.
            loss = model(input_ids=part, labels=part).loss * (len(part) / len(tokens))
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return step, sum(parameter.numel() for parameter in model.parameters())
