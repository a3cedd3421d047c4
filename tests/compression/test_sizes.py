"""Whole variants of allocated and structured recipes, from a checkpoint to compact files and their bytes."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from compression import tasks
from compression.allocation import Allotment, allocate, bins_to_refine
from compression.compact import CompactFile
from compression.container import TensorFile
from compression.evaluation import tally
from compression.measures import WIDTHS
from compression.recipe import Pruning, Quantization, Recipe, Structure
from compression.reduced import reduced_config
from compression.results import LayerResult, VariantFile
from compression.sizes import cost_in_bytes, fixed_bytes
from compression.text import CalibrationText, shards
from compression.workspace import Workspace
from parallelism.models.gpt.config import GPTConfig
from tests.compression import made

CONFIG = GPTConfig(style="llama", layers=4, hidden=64, heads=4, kv_heads=2, ffn_hidden=128, vocab_size=257, context=32)
GPT2 = GPTConfig(style="gpt2", layers=4, hidden=64, heads=4, ffn_hidden=128, vocab_size=257, context=32)
HALF = Pruning(method="magnitude", sparsity=0.5)


def _target(size: int, **more: object) -> Quantization:
    return Quantization.model_validate({"method": "rtn", "target_bytes": size, "group_size": 16, **more})


class Job:
    """A candidate that is calibrated, measured, compressed and put together."""

    def __init__(self, folder: Path, config: GPTConfig) -> None:
        self.config, self.out = config, str(folder / "out")
        self.weights = made.weights(config)
        self.source = str(made.write_checkpoint(folder / "checkpoint", config, self.weights))
        self.text = CalibrationText(
            data_dir=str(made.prepared_text(folder)), sequence_length=24, sequences=8, seed=3, damping=0.01
        )
        for layer in range(config.layers):
            for shard in range(len(shards(self.text.sequences))):
                tasks.calibrate(self.source, layer, shard, self.text, self.out)

    def allot(self, recipes: list[Recipe]) -> Allotment:
        arguments = (self.out, self.text)
        layers = range(self.config.layers)
        measures = [tasks.measure(self.source, layer, recipes, *arguments) for layer in layers]
        bins = bins_to_refine(recipes, measures)
        counts = [tasks.count(self.source, layer, recipes, bins, *arguments) for layer in layers] if bins else []
        return allocate(self.config, recipes, measures, counts)

    def compress(self, layer: int, recipes: list[Recipe], allotment: Allotment) -> LayerResult:
        known = {"allocations": allotment.allocations, "removed": allotment.removed}
        return tasks.compress_layer(self.source, layer, recipes, self.out, text=self.text, **known)

    def variants(self, recipes: list[Recipe]) -> list[VariantFile]:
        allotment = self.allot(recipes)
        for layer in range(self.config.layers):
            self.compress(layer, recipes, allotment)
        tasks.compress_outer(self.source, recipes, self.out)
        return [
            tasks.assemble(self.source, recipe, self.out, removed=allotment.removed.get(recipe.name, ()))
            for recipe in recipes
        ]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("llama"), CONFIG)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("gpt2"), GPT2)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_variant_is_never_larger_than_its_target_and_uses_it(name: str, request: pytest.FixtureRequest) -> None:
    job: Job = request.getfixturevalue(name)
    recipes = [
        Recipe(quantize=_target(130_000), embedding_bits=8),
        Recipe(quantize=_target(150_000, symmetric=False), embedding_bits=16),
        Recipe(quantize=_target(110_000, group_size=None), embedding_bits=4),
        Recipe(prune=HALF, quantize=_target(100_000), embedding_bits=8),
        Recipe(structure=Structure(neurons=0.5), quantize=_target(90_000), embedding_bits=8),
        Recipe(structure=Structure(layers=0.5), quantize=_target(80_000), embedding_bits=8),
    ]
    for recipe, variant in zip(recipes, job.variants(recipes), strict=True):
        assert recipe.quantize is not None
        assert recipe.quantize.target_bytes is not None
        # The header's size is bounded, not known; a step of one matrix is 4 KiB at most.
        left = recipe.quantize.target_bytes - variant.bytes
        assert 0 <= left < 9_000, (recipe.name, left)


def test_the_bytes_of_a_file_are_foretold(llama: Job) -> None:
    recipe = Recipe(prune=HALF, quantize=_target(100_000), embedding_bits=8)
    (variant,) = llama.variants([recipe])
    file = CompactFile(variant.path)
    shapes = {name: encoding.shape for name, encoding in file.encodings.items() if name.startswith("layers.")}
    costs = cost_in_bytes(recipe, shapes, {})
    data = 0
    for name in shapes:
        stored = {key: spec.bytes for key, spec in file.file.specs.items() if key.startswith(name)}
        by_width = costs[name]
        bits = file.encodings[name].bits
        assert bits in WIDTHS
        # At most: methods that prune by rows may keep up to one weight a row more.
        assert sum(stored.values()) <= by_width[bits] <= sum(stored.values()) + math.ceil(shapes[name][0] * bits / 8)
        data += sum(stored.values())
    fixed = fixed_bytes(llama.config, recipe)
    assert variant.bytes - data <= fixed < variant.bytes - data + 5_500


def test_heads_neurons_and_layers_make_smaller_models(llama: Job) -> None:
    structures = [Structure(heads=0.5), Structure(neurons=0.5), Structure(layers=0.5)]
    both = Structure(heads=0.5, neurons=0.25, layers=0.25)
    recipes = [Recipe(), *(Recipe(structure=one) for one in [*structures, both])]
    variants = llama.variants(recipes)
    for recipe, variant in zip(recipes, variants, strict=True):
        file = CompactFile(variant.path)
        smaller = reduced_config(CONFIG, recipe.structure)
        assert file.config == smaller
        assert variant.parameters == smaller.parameter_count() - (384 - 257) * 64
        for index in range(smaller.layers):
            assert {name: tuple(value.shape) for name, value in file.layer(index).items()} == smaller.layer_shapes()
    assert [CompactFile(variant.path).config.layers for variant in variants] == [4, 4, 4, 2, 3]
    tokens = made.rows(CONFIG, 4)
    totals = tally([CompactFile(one.path) for one in variants], lambda positions: tokens[np.asarray(positions)], 4)
    assert all(total.tokens == 96 for total in totals)
    assert len({round(total.loss, 3) for total in totals}) == 5


def test_the_layers_that_stay_are_the_dense_ones_in_their_order(llama: Job) -> None:
    recipe = Recipe(structure=Structure(layers=0.5))
    removed = llama.allot([recipe]).removed[recipe.name]
    (variant,) = llama.variants([recipe])
    file = CompactFile(variant.path)
    assert file.facts["removed_layers"] == list(removed)
    left = [index for index in range(4) if index not in removed]
    for number, index in enumerate(left):
        for name, value in file.layer(number).items():
            assert torch.equal(value, llama.weights[f"layers.{index}.{name}"].bfloat16().float())
    with pytest.raises(AssertionError, match="leaves 2 layers, not 4"):
        tasks.assemble(llama.source, recipe, llama.out)


def test_layers_that_go_are_not_solved_and_those_that_stay_are_the_same_bits(llama: Job) -> None:
    gptq = Quantization(method="gptq", bits=4, group_size=16)
    halved = Recipe(structure=Structure(layers=0.5), quantize=gptq)
    recipes = [Recipe(), Recipe(quantize=gptq), Recipe(structure=Structure(layers=0.5)), halved]
    allotment = llama.allot(recipes)
    gone = allotment.removed[halved.name]
    assert len(gone) == 2

    def tensors(layer: int, allotment: Allotment) -> dict[str, dict[str, bytes]]:
        folder = Workspace(llama.out).layer(layer)
        parts = llama.compress(layer, recipes, allotment).parts
        files = {part.recipe.name: TensorFile(folder / part.file) for part in parts}
        return {
            name: {key: file.read(key).view(-1).view(torch.uint8).numpy().tobytes() for key in file.specs}
            for name, file in files.items()
        }

    for layer in range(4):
        every = tensors(layer, Allotment(allocations={}))
        left = tensors(layer, allotment)
        assert set(every) == {recipe.name for recipe in recipes}
        assert set(left) == {recipe.name for recipe in recipes if layer not in gone or not recipe.structure}
        assert left == {name: every[name] for name in left}


def test_a_global_threshold_over_the_whole_checkpoint(llama: Job) -> None:
    recipe = Recipe(prune=Pruning(method="magnitude", sparsity=0.7, scope="global"))
    (variant,) = llama.variants([recipe])
    names = [name for name, value in llama.weights.items() if name.startswith("layers.") and value.ndim == 2]
    every = torch.cat([llama.weights[name].abs().flatten() for name in names])
    threshold = every.sort().values[round(0.7 * every.numel()) - 1]
    assert variant.sparsity == round(0.7 * every.numel()) / every.numel()
    file = CompactFile(variant.path)
    for name in names:
        assert torch.equal(file.tensor(name) != 0, llama.weights[name].abs() > threshold)


def test_what_is_measured_is_not_measured_again(llama: Job) -> None:
    recipes = [Recipe(quantize=_target(130_000))]
    found = tasks.measure(llama.source, 1, recipes, llama.out, llama.text)
    path = Workspace(llama.out).measures(1, "measures")
    written = path.stat().st_mtime_ns
    assert tasks.measure(llama.source, 1, recipes, llama.out, llama.text) == found
    assert path.stat().st_mtime_ns == written
    path.write_text("{")
    assert tasks.measure(llama.source, 1, recipes, llama.out, llama.text) == found
    other = [Recipe(quantize=_target(130_000, group_size=None))]
    assert tasks.measure(llama.source, 1, other, llama.out, llama.text).inputs != found.inputs
