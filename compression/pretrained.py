"""A Hugging Face directory (``config.json``, one or several ``*.safetensors``), read lazily, one layer at a time.

Nothing in the directory is executed and nothing is unpickled. What the files hold is compared with what the config says
before any weight is read.
"""

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from compression.container import TensorFile
from compression.huggingface import BASE_PREFIX, layer_weights, outer_weights, tensor_shapes
from compression.huggingface_config import read_config
from parallelism.models.gpt.config import GPTConfig

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NO_WEIGHTS = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")
"""Constants that older versions of Transformers stored with the weights."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class PretrainedWeights:
    """The weights in a directory: :class:`compression.evaluation.Weights`.

    Raises ``ValueError`` where the model is another than those computed here, where shards are missing or truncated,
    and where tensors are missing, superfluous, or of another shape or type than the config says, naming them.
    """

    def __init__(self, directory: str | Path, device: torch.device | str = "cpu") -> None:
        self.directory = Path(directory)
        self.device = torch.device(device)
        self._config = read_config(_json(self.directory / CONFIG), str(self.directory / CONFIG))
        self.files = [TensorFile(path) for path in _weight_files(self.directory)]
        self._places = _places(self._config, self.files)
        _check_tensors(self._config, self._places, self.directory)

    @property
    def config(self) -> GPTConfig:
        """The model."""
        return self._config

    def layer(self, index: int) -> dict[str, Tensor]:
        """Canonical name → float32 tensor of layer ``index``, prefix ``layers.{index}.`` left off."""
        return self._moved(layer_weights(self._config, index, self._read))

    def outer(self) -> dict[str, Tensor]:
        """Canonical name → float32 tensor of everything outside the layers."""
        return self._moved(outer_weights(self._config, self._read))

    def _read(self, name: str) -> Tensor:
        file, stored = self._places[name]
        return file.read(stored).float()

    def _moved(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in weights.items()}


def _weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights: one, or those that the index names."""
    if (directory / INDEX).is_file():
        weight_map = _json(directory / INDEX).get("weight_map")
        names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
        foreign = [name for name in names if Path(name).name != name]
        if not names or foreign:
            raise ValueError(f"{directory / INDEX} names no files of its own directory ({foreign}): take the right one")
    else:
        names = [WEIGHTS]
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ValueError(_missing(directory, missing))
    return [directory / name for name in names]


def _missing(directory: Path, names: list[str]) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles and names == [WEIGHTS]:
        return (
            f"{directory} holds its weights in {pickles[0]}, a pickle, which can run code when it is opened: convert it"
            " to safetensors where you trust it (load it with Transformers there and call save_pretrained)"
        )
    return f"{directory}: the weight files {', '.join(names)} are missing: fetch the whole model"


def _places(config: GPTConfig, files: list[TensorFile]) -> dict[str, tuple[TensorFile, str]]:
    """Name in Transformers → file and name in it. Files of a model without its head lack the base's prefix."""
    base = BASE_PREFIX[config.style]
    places: dict[str, tuple[TensorFile, str]] = {}
    for file in files:
        for stored in file.specs:
            name = stored if stored.startswith((base, "lm_head.")) else base + stored
            if _NO_WEIGHTS.search(name):
                continue
            if name in places:
                raise ValueError(f"{file.path} and {places[name][0].path} both hold {name}: remove one of them")
            places[name] = (file, stored)
    return places


def _check_tensors(config: GPTConfig, places: dict[str, tuple[TensorFile, str]], directory: Path) -> None:
    expected = tensor_shapes(config)
    for name in sorted(expected.keys() - places.keys()):
        raise ValueError(f"{directory}: {name} is missing from its files: fetch the whole model, or mend {CONFIG}")
    for name in sorted(places.keys() - expected.keys()):
        tied = ": set tie_word_embeddings to false if it is used" if name == "lm_head.weight" else ""
        raise ValueError(f"{directory}: its files hold {name}, which the model in {CONFIG} does not have{tied}")
    for name, shape in expected.items():
        file, stored = places[name]
        spec = file.specs[stored]
        if spec.shape != shape:
            problem = f"{name} has shape {spec.shape}, {shape} by {CONFIG}: they do not belong together"
            raise ValueError(f"{file.path}: {problem}")
        if spec.dtype not in _DTYPES:
            problem = f"{name} is of {spec.dtype}: only float32, float16 and bfloat16 weights are read"
            raise ValueError(f"{file.path}: {problem}")


def _json(path: Path) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: name a complete Hugging Face directory") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): fetch it again") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds no JSON object: fetch it again")
    return document
