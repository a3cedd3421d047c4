"""Small models that were pruned, and what ranks do with them in the tests of recovery."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from parallelism.layer_reader import CheckpointWeights, plain_family
from parallelism.models.base import ModelConfig
from parallelism.models.gpt.plain import outer_shapes
from parallelism.plain_checkpoint import write_checkpoint
from parallelism.result import TrainResult
from parallelism.start import StartPoint
from parallelism.training import TrainTask
from tests.parallelism.real_runs import Event, run_once, stored_tensors
from tests.parallelism.small_gpt import global_rows, make_engine, micro_batches, small_task, train

MODEL = {"layers": 4, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn_hidden": 48}
"""Parts that groups of 8 columns divide, on two tensor-parallel ranks too; 250 tokens, padded to 256."""
LINEAR = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
HELD_OUT = 999


class MadeWeights:
    """Weights by canonical name: drawn, or another model's with the smallest of every linear matrix set to zero."""

    def __init__(self, config: ModelConfig, sparsity: float = 0.0, of: CheckpointWeights | None = None) -> None:
        self.config = config
        self.sparsity = sparsity
        self.of = of

    def layer(self, index: int) -> dict[str, Tensor]:
        tensors = self.of.layer(index) if self.of else self._drawn(self.config.layer_shapes(), index)
        return {name: self._pruned(tensor) if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}

    def outer(self) -> dict[str, Tensor]:
        return self.of.outer() if self.of else self._drawn(outer_shapes(self.config), -1)

    def _drawn(self, shapes: Mapping[str, tuple[int, ...]], index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(100 + index)
        return {
            name: torch.randn(shape, generator=generator) * 0.1 + float(name.endswith("norm.weight"))
            for name, shape in shapes.items()
        }

    def _pruned(self, tensor: Tensor) -> Tensor:
        count = round(self.sparsity * tensor.numel())
        if count == 0:
            return tensor
        return tensor.masked_fill(tensor.abs() <= tensor.abs().flatten().kthvalue(count).values, 0.0)


def start_task(start: StartPoint | None, layout: dict[str, Any] | None = None, **training: Any) -> TrainTask:
    """The small model, beginning at ``start``."""
    layout = layout or {}
    if layout.get("engine") == "lean":
        training["micro_batch"] = 8 // layout.get("data", 1)
    task = small_task(layout=layout, training={"gradient_clip": 0.5, **training}, model=MODEL)
    return task.model_copy(update={"start": start})


def started(task: TrainTask) -> Any:
    """The engine with the weights it begins with."""
    from parallelism import checkpoint

    engine = make_engine(task)
    checkpoint.load_weights(engine, task.start.weights)
    return engine


def train_dense(root: Path, steps: int) -> None:
    """A checkpoint ``root/dense`` of the small model after some steps, its manifest included."""
    from parallelism import checkpoint
    from parallelism.budget import Progress
    from parallelism.checkpoint_store import CheckpointStore, Metrics

    task = start_task(None)
    engine = make_engine(task)
    train(engine, task, 0, steps)
    checkpoint.save(engine, Progress(steps), root / "dense")
    CheckpointStore(root).commit(root / "dense", task, Progress(steps), Metrics())


def pruned_from(dense: Path, sparsity: float) -> Path:
    """A weights-only checkpoint beside the dense one."""
    weights = CheckpointWeights(dense)
    name = dense.with_name(f"pruned{sparsity}")
    return write_checkpoint(MadeWeights(weights.config, sparsity, weights), name, str(sparsity)).path


def zeros_of_every_step(tasks: list[TrainTask], steps: int) -> list[dict[str, Any]]:
    """For each task: whether zeros stayed in weights, masters and moments after every step, and what else happened."""
    return [_zeros_of_every_step(task, steps) for task in tasks]


def _zeros_of_every_step(task: TrainTask, steps: int) -> dict[str, Any]:
    zeros = {key: tensor == 0.0 for key, tensor in stored_tensors(task.start.weights).items() if key.endswith(LINEAR)}
    engine = started(task)
    before = engine.evaluate(micro_batches(task, engine.data_rank, HELD_OUT))
    seen: dict[str, Any] = {"broken": [], "kinds": set(), "zeros": 0, "others": 0, "losses": []}
    for step in range(steps):
        seen["losses"] += train(engine, task, step, step + 1)[0]
        for key, values, mask in _linear_pieces(engine, zeros):
            if not bool((values[mask] == 0.0).all()):
                seen["broken"].append((step, key))
            kind = key.removeprefix("optimizer.state.").split(".")[0]
            seen["kinds"].add(kind)
            if kind == "decoder":
                seen["zeros"] += int(mask.sum())
                seen["others"] += int((values[~mask] == 0.0).sum())
    seen |= {"before": before, "after": engine.evaluate(micro_batches(task, engine.data_rank, HELD_OUT))}
    return seen


def _linear_pieces(engine: Any, zeros: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(stored name, values, where zeros belong) of all that this rank holds of the linear weights."""
    for piece in engine.sharded_state():
        key = next((key for key in zeros if piece.key.endswith(key)), None)
        if key is not None:
            window = tuple(
                slice(start, start + size) for start, size in zip(piece.global_offset, piece.local_shape, strict=True)
            )
            yield piece.key, piece.data.detach(), zeros[key][window]


def gradients(task: TrainTask) -> dict[str, Any]:
    """One step: the loss, and (stored name, offset, gradient of the mean loss) of all that this rank holds."""
    engine = started(task)
    loss = engine.train_step(micro_batches(task, engine.data_rank, 0), 1e-3).loss
    # Engine lean has used its gradients up by now.
    return {"loss": loss, "gradients": [] if task.layout.engine == "lean" else list(_gradients(engine))}


def _gradients(engine: Any) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
    from parallelism.engines import state

    for stored in state.stored_parameters(engine.chunks):
        flat, begin = stored.parameter.main_grad.reshape(-1), 0
        for block in stored.blocks:
            size = block.data.numel()
            values = flat[begin : begin + size].view(block.local_shape)
            yield block.key, tuple(block.global_offset), values.numpy().copy()
            begin += size


def run_many(attempts: list[tuple[TrainTask, int | None]]) -> list[tuple[TrainResult, list[Event]]]:
    """Attempts of :func:`tests.parallelism.real_runs.run_once`, each with the step after which it is paused."""
    return [run_once(task, stop_at) for task, stop_at in attempts]


def all_gradients(tasks: list[TrainTask]) -> list[dict[str, Any]]:
    """:func:`gradients` of several tasks in the same processes."""
    return [gradients(task) for task in tasks]


class PlainModel:
    """A whole model in torch alone, its canonical weights leaves of the graph."""

    def __init__(self, checkpoint: str | Path) -> None:
        weights = CheckpointWeights(checkpoint)
        self.config, self.family = weights.config, plain_family(weights.config)
        self.outer = {name: tensor.requires_grad_() for name, tensor in weights.outer().items()}
        self.layers = [
            {name: tensor.requires_grad_() for name, tensor in weights.layer(index).items()}
            for index in range(weights.config.layers)
        ]

    def logits(self, tokens: Tensor) -> Tensor:
        hidden = self.family.embed(self.config, self.outer, tokens)
        for weights in self.layers:
            hidden = self.family.layer(self.config, weights, hidden)
        return self.family.logits(self.config, self.outer, hidden)

    def stored_gradients(self) -> dict[str, Tensor]:
        """Stored name → gradient of the whole tensor."""
        slopes = [{name: tensor.grad for name, tensor in part.items()} for part in (self.outer, *self.layers)]
        found = dict(self.family.join_outer(self.config, slopes[0]))
        for index, part in enumerate(slopes[1:]):
            joined = self.family.join_layer(self.config, part)
            found |= {f"decoder.layers.{index}.{name}": tensor for name, tensor in joined.items()}
        return found


def plain_loss(task: TrainTask, student: PlainModel, teacher: PlainModel | None, step: int) -> Tensor:
    """Mean loss over a step's samples, written as in the paper."""
    rows = torch.from_numpy(global_rows(task, step))
    tokens, labels = rows[:, :-1], rows[:, 1:].flatten()
    logits = student.logits(tokens).flatten(0, 1)
    hard = cross_entropy(logits, labels)
    if teacher is None:
        return hard
    weight, temperature = task.start.distill_weight, task.start.temperature
    aim = log_softmax(teacher.logits(tokens).flatten(0, 1).detach() / temperature, -1)
    divergence = (aim.exp() * (aim - log_softmax(logits / temperature, -1))).sum(-1).mean()
    return (1 - weight) * hard + weight * temperature**2 * divergence


def recover_and_save(task: TrainTask, steps: int, directory: Path) -> float:
    """Some steps, a checkpoint, and the loss on held-out samples."""
    from parallelism import checkpoint
    from parallelism.budget import Progress
    from parallelism.checkpoint_store import CheckpointStore, Metrics

    engine = started(task)
    train(engine, task, 0, steps)
    checkpoint.save(engine, Progress(steps), directory)
    if torch.distributed.get_rank() == 0:
        CheckpointStore(directory.parent).commit(directory, task, Progress(steps), Metrics())
    return float(engine.evaluate(micro_batches(task, engine.data_rank, HELD_OUT)))


def chosen_smallest(matrices: list[np.ndarray], sparsities: list[float]) -> list[list[np.ndarray]]:
    """What this rank's parts of matrices lose at each sparsity: of the odd ones columns are divided, of others rows."""
    from megatron.core import parallel_state

    from parallelism.engines.megatron import start_parallel_state
    from parallelism.engines.sparsity import smallest
    from parallelism.layout import Layout
    from parallelism.models.base import StoredMatrix

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    start_parallel_state(Layout(tensor=world), seed=0)
    parts = [
        StoredMatrix(str(index), torch.from_numpy(matrix).chunk(world, dim=index % 2)[rank], index % 2)
        for index, matrix in enumerate(matrices)
    ]
    group = parallel_state.get_tensor_model_parallel_group()
    return [[mask.numpy() for mask in smallest(parts, sparsity, group)] for sparsity in sparsities]
