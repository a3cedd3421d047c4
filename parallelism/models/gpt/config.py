"""Shape of a decoder-only language model. Torch-free."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from parallelism.models.base import ModelConfig

Activation = Literal["gelu", "gelu_tanh"]


class GPTConfig(ModelConfig):
    """GPT-2 style (LayerNorm, learned positions, GELU, biases) or Llama style (RMSNorm, RoPE, SwiGLU, no biases)."""

    family: Literal["gpt"] = "gpt"
    style: Literal["gpt2", "llama"] = "llama"
    kv_heads: PositiveInt | None = Field(default=None, description="grouped-query attention; default: heads")
    head_dim: PositiveInt | None = Field(default=None, description="default: hidden / heads")
    ffn_hidden: PositiveInt | None = Field(
        default=None, description="default: 4·hidden (gpt2), 8/3·hidden rounded up to 64 (llama)"
    )
    activation: Activation = Field(
        default="gelu",
        # A model that it says nothing new of is described in the words it always was, and keeps its fingerprints.
        exclude_if=lambda activation: activation == "gelu",
        description="of style gpt2: GELU as it is defined (with erf), or the tanh approximation, as in OpenAI's models",
    )
    tied_embeddings: bool = True
    rope_base: float = Field(default=10000.0, gt=1.0)
    norm_epsilon: float = Field(default=1e-5, gt=0.0, lt=1e-2)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    initializer_std: float = Field(default=0.02, gt=0.0)

    @model_validator(mode="after")
    def _divides(self) -> "GPTConfig":
        if self.head_dim is None and self.hidden % self.heads:
            raise ValueError(
                f"hidden {self.hidden} is not divisible by heads {self.heads}: change one, or give head_dim"
            )
        if self.heads % self.query_groups:
            raise ValueError(f"heads {self.heads} is not divisible by kv_heads {self.query_groups}")
        if self.style == "llama" and self.channels % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {self.channels}: change heads or hidden")
        if self.style == "llama" and self.activation != "gelu":
            raise ValueError(f"activation {self.activation} belongs to style gpt2, llama has SwiGLU: leave it out")
        return self

    @property
    def query_groups(self) -> int:
        """Number of key/value heads."""
        return self.kv_heads or self.heads

    @property
    def channels(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden // self.heads

    @property
    def feed_forward(self) -> int:
        """Width of the feed-forward block."""
        if self.ffn_hidden:
            return self.ffn_hidden
        return 4 * self.hidden if self.style == "gpt2" else -(-8 * self.hidden // 3 // 64) * 64

    @property
    def bias(self) -> bool:
        """Whether linear layers carry biases."""
        return self.style == "gpt2"

    @property
    def gated(self) -> bool:
        """Whether the feed-forward block has a gate (SwiGLU)."""
        return self.style == "llama"

    @property
    def gelu_approximation(self) -> str:
        """torch's name for the form of GELU."""
        return "tanh" if self.activation == "gelu_tanh" else "none"

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Canonical names of one layer's linear weights → (out, in)."""
        query, key = self.heads * self.channels, self.query_groups * self.channels
        shapes = {
            "attention.q": (query, self.hidden),
            "attention.k": (key, self.hidden),
            "attention.v": (key, self.hidden),
            "attention.o": (self.hidden, query),
        }
        if self.gated:
            shapes["mlp.gate"] = (self.feed_forward, self.hidden)
        return shapes | {"mlp.up": (self.feed_forward, self.hidden), "mlp.down": (self.hidden, self.feed_forward)}

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical names of everything in one layer → shape."""
        norm = {"weight": (self.hidden,)} | ({"bias": (self.hidden,)} if self.bias else {})
        shapes: dict[str, tuple[int, ...]] = {}
        for block in ("attention", "mlp"):
            shapes |= {f"{block}.norm.{part}": shape for part, shape in norm.items()}
        for name, (out, width) in self.linear_shapes().items():
            shapes[f"{name}.weight"] = (out, width)
            if self.bias:
                shapes[f"{name}.bias"] = (out,)
        return shapes

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"embedding.tokens": (self.padded_vocab_size, self.hidden)}
        if self.style == "gpt2":
            shapes["embedding.positions"] = (self.context, self.hidden)
        for index in range(self.layers):
            shapes |= {f"layers.{index}.{name}": shape for name, shape in self.layer_shapes().items()}
        shapes["final_norm.weight"] = (self.hidden,)
        if self.bias:
            shapes["final_norm.bias"] = (self.hidden,)
        if not self.tied_embeddings:
            shapes["output.weight"] = (self.padded_vocab_size, self.hidden)
        return shapes

    def parameter_count(self) -> int:
        layer = sum(_size(shape) for shape in self.layer_shapes().values())
        outer = self.padded_vocab_size * self.hidden * (1 if self.tied_embeddings else 2)
        positions = self.context * self.hidden if self.style == "gpt2" else 0
        final = self.hidden * (2 if self.bias else 1)
        return self.layers * layer + outer + positions + final

    def forward_flops(self, sequence_length: int) -> float:
        """Matrix products only: linear layers, all S×S attention scores (as in Narayanan et al. 2021), output layer."""
        linear = sum(2 * out * width for out, width in self.linear_shapes().values())
        attention = 4 * sequence_length * self.heads * self.channels
        output = 2 * self.hidden * self.padded_vocab_size
        return float(sequence_length * (self.layers * (linear + attention) + output))


def _size(shape: tuple[int, ...]) -> int:
    total = 1
    for extent in shape:
        total *= extent
    return total
