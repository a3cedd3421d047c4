"""Bad input of the engine, as a table: each is refused with its layer or field, and nothing half-written remains."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from compression import tasks
from compression.calibration import CalibrationFiles, Gathered
from compression.config import CompressionConfig
from compression.container import TensorFile
from compression.recipe import Pruning, Quantization, Recipe, Structure, grid
from compression.source import open_weights
from compression.text import CalibrationText
from tests.compression import made

LAYER = 1
CONFIG = made.LLAMA.model_copy(update={"vocab_size": 257})
RTN = Recipe(quantize=Quantization(method="rtn", bits=4, group_size=16), embedding_bits=8)
GPTQ = Recipe(quantize=Quantization(method="gptq", bits=4), embedding_bits=8)
SPARSEGPT = Recipe(prune=Pruning(method="sparsegpt", sparsity=0.5))
HEADS = Recipe(structure=Structure(heads=0.5))
STORED = "model.layers.1.mlp.up_proj.weight"


@dataclass(frozen=True)
class Inputs:
    """What every case gets a copy of: a checkpoint and the same model as others would save it, text, an output."""

    checkpoint: str
    pretrained: str
    text: CalibrationText
    out: str

    @property
    def weights(self) -> Path:
        """The file with the pretrained weights."""
        return Path(self.pretrained) / "model.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    made.write_checkpoint(folder / "checkpoint", CONFIG, made.weights(CONFIG))
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 6}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=32, **shape))
    model.save_pretrained(folder / "pretrained")
    made.prepared_text(folder)
    return folder


@pytest.fixture
def inputs(sound: Path, tmp_path: Path) -> Inputs:
    shutil.copytree(sound, tmp_path / "in")
    (checkpoint,) = (tmp_path / "in" / "checkpoint").iterdir()
    text = CalibrationText(
        data_dir=str(tmp_path / "in" / "data"), sequence_length=24, sequences=4, seed=3, damping=0.01
    )
    return Inputs(str(checkpoint), str(tmp_path / "in" / "pretrained"), text, str(tmp_path / "out"))


Step = Callable[[Inputs], object]


def layer(*recipes: Recipe, source: str = "checkpoint", text: bool = False) -> Step:
    """Compress one layer."""

    def step(inputs: Inputs) -> object:
        known = inputs.text if text else None
        return tasks.compress_layer(getattr(inputs, source), LAYER, list(recipes), inputs.out, text=known)

    return step


def outer(source: str = "checkpoint", recipe: Recipe = RTN) -> Step:
    """Compress what stands outside the layers."""
    return lambda inputs: tasks.compress_outer(getattr(inputs, source), [recipe], inputs.out)


def chain(recipe: Recipe) -> Step:
    """The first step of a recipe's own calibration, behind its embeddings."""
    return lambda inputs: tasks.compress_next(inputs.checkpoint, 0, recipe, inputs.out, text=inputs.text)


def calibrate(source: str) -> Step:
    """The first step of calibration."""
    return lambda inputs: tasks.calibrate(getattr(inputs, source), 0, 0, inputs.text, inputs.out)


def start(inputs: Inputs) -> object:
    """Make the checkpoint that a recovery begins with."""
    return tasks.to_checkpoint(inputs.pretrained, f"{inputs.out}/start")


def put_together(inputs: Inputs) -> object:
    """The variant of layers that are committed."""
    return tasks.assemble(inputs.checkpoint, RTN, inputs.out)


def configure(**compression: Any) -> Step:
    """A job's part on compression."""
    return lambda inputs: grid(CompressionConfig.model_validate(compression))


def described_as(**changes: Any) -> Step:
    """The pretrained model says something else of itself."""

    def step(inputs: Inputs) -> object:
        path = Path(inputs.pretrained) / "config.json"
        return path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return step


def cut(inputs: Inputs) -> object:
    """The pretrained weights end early."""
    return inputs.weights.write_bytes(inputs.weights.read_bytes()[:-100])


def cut_in_the_header(inputs: Inputs) -> object:
    """They end before the names of the tensors do."""
    return inputs.weights.write_bytes(inputs.weights.read_bytes()[:50])


def cut_checkpoint(inputs: Inputs) -> object:
    """A checkpoint's file of tensors ends early."""
    (path,) = Path(inputs.checkpoint).glob("*.distcp")
    return path.write_bytes(path.read_bytes()[:1000])


def cut_layer(inputs: Inputs) -> object:
    """Everything is compressed, and then the file of one layer ends early."""
    for index in range(CONFIG.layers):
        tasks.compress_layer(inputs.checkpoint, index, [RTN], inputs.out)
    tasks.compress_outer(inputs.checkpoint, [RTN], inputs.out)
    (path,) = (Path(inputs.out) / "layers" / "00001").glob("*.safetensors")
    return path.write_bytes(path.read_bytes()[:-1])


def with_value(name: str, value: float) -> Step:
    """One of the pretrained weights is ``value``."""

    def step(inputs: Inputs) -> None:
        tensors = load_file(inputs.weights)
        tensors[name].view(-1)[5] = value
        save_file(tensors, inputs.weights, {"format": "pt"})

    return step


def statistics_with(change: Callable[[torch.Tensor], object]) -> Step:
    """Calibrated, but then the H of what the feed-forward block and the output projection read is changed."""

    def step(inputs: Inputs) -> None:
        for index in range(LAYER + 1):
            tasks.calibrate(inputs.checkpoint, index, 0, inputs.text, inputs.out)
        (folder,) = (Path(inputs.out) / "statistics").iterdir()
        gathered, path = Gathered(), CalibrationFiles(Path(inputs.out), folder.name).sums(LAYER, 0)
        gathered.add_file(TensorFile(path), "cpu")
        for name in ("attention.o", "mlp.gate"):
            change(gathered.sums[name].hessian)
        gathered.write(path)

    return step


def no_matrix_of_squares(hessian: torch.Tensor) -> None:
    """As if two columns were a hundred times as alike as a column is itself: no damping makes that invertible."""
    hessian[3, 4] = hessian[4, 3] = 100.0 * hessian.max()


def overflown(hessian: torch.Tensor) -> None:
    """A sum beyond float32."""
    hessian[0, 0] = torch.inf


def nothing(inputs: Inputs) -> None:
    """The input is sound."""


@dataclass(frozen=True)
class Bad:
    """What is damaged, what is done then, and what the refusal says."""

    name: str
    damage: Step
    action: Step
    message: str


NO_MODEL = r"config\.json: model_type 'qwen3'.*supported are"
OTHER_MODEL = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
GROUP = r"quantize\.group_size 20 does not divide the 48 columns of layers\.0\.attention\.q\.weight"
CUT = r"model\.safetensors is truncated or no safetensors file"
NOT_FINITE = r"weights are not finite: the training diverged"
SINGULAR = r"\(H = XᵀX\) are singular even with damping .*: calibrate again with more sequences"
WIDE = {"quantize": Quantization(method="rtn", bits=4, group_size=20)}

TABLE = [
    # Unsupported architecture
    Bad("another architecture, layer", described_as(**OTHER_MODEL), layer(RTN, source="pretrained"), NO_MODEL),
    Bad("another architecture, embeddings", described_as(**OTHER_MODEL), outer("pretrained"), NO_MODEL),
    Bad("another architecture, calibration", described_as(**OTHER_MODEL), calibrate("pretrained"), NO_MODEL),
    Bad("another architecture, recovery", described_as(**OTHER_MODEL), start, NO_MODEL),
    Bad(
        "weights of another shape than described",
        described_as(intermediate_size=80),
        layer(RTN, source="pretrained"),
        r"model\.layers\.0\.mlp\.gate_proj\.weight has shape \(64, 48\), \(80, 48\) by config\.json",
    ),
    # Truncated safetensors
    Bad("weights cut, layer", cut, layer(RTN, source="pretrained"), CUT),
    Bad("weights cut, embeddings", cut, outer("pretrained"), CUT),
    Bad("weights cut, calibration", cut, calibrate("pretrained"), CUT),
    Bad("weights cut, recovery", cut, start, CUT),
    Bad("weights cut in the header", cut_in_the_header, layer(RTN, source="pretrained"), CUT),
    Bad("checkpoint cut", cut_checkpoint, layer(RTN), r"is damaged: missing or of another size: __0_0\.distcp"),
    Bad("committed layer cut", cut_layer, put_together, r"layer 1 has not been compressed, or its files are damaged"),
    # Weights that are not finite
    Bad(
        "NaN in a layer",
        with_value(STORED, torch.nan),
        layer(RTN, source="pretrained"),
        rf"layer 1, mlp\.up\.weight: 1 of 3072 {NOT_FINITE}",
    ),
    Bad(
        "infinity in a layer",
        with_value(STORED, -torch.inf),
        layer(SPARSEGPT, RTN, source="pretrained"),
        rf"layer 1, mlp\.up\.weight: 1 of 3072 {NOT_FINITE}",
    ),
    Bad(
        "NaN in a norm",
        with_value("model.layers.1.input_layernorm.weight", torch.nan),
        layer(RTN, source="pretrained"),
        rf"layer 1, attention\.norm\.weight: 1 of 48 {NOT_FINITE}",
    ),
    Bad(
        "NaN in the embeddings",
        with_value("model.embed_tokens.weight", torch.nan),
        outer("pretrained"),
        rf"^embedding\.tokens: 1 of 12336 {NOT_FINITE}",
    ),
    # Singular H
    Bad(
        "singular H, GPTQ",
        statistics_with(no_matrix_of_squares),
        layer(GPTQ, text=True),
        rf"attention\.o: .*{SINGULAR}",
    ),
    Bad(
        "singular H, SparseGPT beside others",
        statistics_with(no_matrix_of_squares),
        layer(RTN, SPARSEGPT, text=True),
        rf"attention\.o: .*{SINGULAR}",
    ),
    Bad(
        "singular H, heads removed",
        statistics_with(no_matrix_of_squares),
        layer(HEADS, text=True),
        r"attention\.o: its inputs' H is singular, so that structure\.heads cannot be carried out",
    ),
    Bad(
        "H that is not finite",
        statistics_with(overflown),
        layer(GPTQ, text=True),
        r"attention\.o: the calibration statistics .* are not finite",
    ),
    # A group size that does not divide
    Bad("group size, layer", nothing, layer(RTN, Recipe(**WIDE)), GROUP),
    Bad("group size, chain", outer(recipe=Recipe(**WIDE)), chain(Recipe(**WIDE)), GROUP),
    Bad(
        "group size after a structure",
        nothing,
        layer(Recipe(structure=Structure(neurons=0.4), quantize=RTN.quantize), text=True),
        r"quantize\.group_size 16 does not divide the 40 columns of layers\.0\.mlp\.down\.weight after neurons-s40",
    ),
    # Sparsity 1.0 and one bit
    Bad("sparsity 1, job", nothing, configure(prune={"methods": ["wanda"], "sparsity": [1.0]}), r"prune\.sparsity\.0"),
    Bad("sparsity 1, structure", nothing, configure(structure={"layers": [1.0]}), r"structure\.layers\.0"),
    Bad("sparsity 1, recipe", nothing, lambda _: Pruning(method="wanda", sparsity=1.0), r"sparsity\n.*less than 1"),
    Bad("one bit, job", nothing, configure(quantize={"methods": ["rtn"], "bits": [1]}), r"quantize\.bits\.0"),
    Bad("one bit, recipe", nothing, lambda _: Quantization(method="rtn", bits=1), r"bits\n.*8, 6, 4, 3 or 2"),
    Bad(
        "one bit on average",
        nothing,
        configure(quantize={"methods": ["rtn"], "average_bits": [1.0]}),
        r"average_bits\.0",
    ),
]


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name)
def test_bad_input_is_named_and_leaves_nothing_half_written(bad: Bad, inputs: Inputs) -> None:
    bad.damage(inputs)
    before = _files(inputs)
    with pytest.raises(ValueError, match=bad.message):
        bad.action(inputs)
    assert _files(inputs) == before


def test_the_same_steps_go_through_with_sound_input(inputs: Inputs) -> None:
    """So that none of them is refused for another reason."""
    statistics_with(lambda hessian: hessian)(inputs)
    layer(RTN, GPTQ, SPARSEGPT, HEADS, text=True)(inputs)
    for source in ("checkpoint", "pretrained"):
        calibrate(source)(inputs)
        layer(RTN, source=source)(inputs)
        outer(source)(inputs)
    outer(recipe=GPTQ)(inputs)
    chain(GPTQ)(inputs)
    start(inputs)
    described_as()(inputs)
    assert open_weights(inputs.pretrained).layer(LAYER)


def _files(inputs: Inputs) -> dict[Path, int]:
    """Everything in the output directory, with the time of its last change."""
    return {path: path.stat().st_mtime_ns for path in Path(inputs.out).rglob("*") if path.is_file()}
