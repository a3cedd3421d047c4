"""What compression of one candidate writes, and where. Torch-free.

    DIR/layers/00003/RECIPE.HASH.safetensors   one recipe's share of layer 3
    DIR/layers/00003/manifest.json             written last: the layer is committed
    DIR/layers/outer/…                         the same for everything outside the layers
    DIR/measures/00003.KIND.json               what was measured of layer 3, where strengths follow from all layers
    DIR/variants/RECIPE.safetensors            a whole variant's compact file

Everything is written under a unique name and then renamed. HASH is of the inputs, so that a late writer of other
inputs cannot overwrite a committed file, and one of the same inputs writes the same bytes.
"""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from pydantic import ValidationError

from compression.recipe import Recipe
from compression.results import LayerResult
from parallelism import places

MANIFEST = "manifest.json"
CODE_VERSION = 3
"""Raised when the same inputs come to give other files: committed layers of older code are then made anew."""


class Workspace:
    """The paths and commits below one candidate's compression directory."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def layer(self, index: int | None) -> Path:
        """The folder of one layer, or (None) of everything outside the layers."""
        return self.directory / "layers" / ("outer" if index is None else f"{index:05d}")

    def measures(self, index: int, kind: str) -> Path:
        """What was measured of one layer, in the first pass (``measures``) or the second (``counts``)."""
        return self.directory / "measures" / f"{index:05d}.{kind}.json"

    def variant(self, recipe: Recipe) -> Path:
        """A whole variant's compact file."""
        return self.directory / "variants" / f"{recipe.name}.safetensors"

    def committed(self, index: int | None, inputs: str | None = None) -> LayerResult | None:
        """What was committed for this layer, if its files are whole and (where given) it was made of ``inputs``."""
        folder = self.layer(index)
        try:
            result = LayerResult.model_validate_json(places.read_bytes(folder / MANIFEST))
        except (FileNotFoundError, ValidationError):
            return None
        if inputs is not None and result.inputs != inputs:
            return None
        found = places.sizes(folder)
        return result if all(found.get(part.file) == part.bytes for part in result.parts) else None

    def require(self, index: int | None) -> LayerResult:
        """What was committed for this layer. Raises ``ValueError`` where nothing was."""
        result = self.committed(index)
        if result is None:
            what = "what stands outside the layers" if index is None else f"layer {index}"
            raise ValueError(f"{self.directory}: {what} has not been compressed, or its files are damaged: compress it")
        return result

    def commit(self, result: LayerResult) -> None:
        """Declare a layer done; its files must be there. What other inputs left in its folder is removed."""
        folder = self.layer(result.layer)
        places.write_text(folder / MANIFEST, result.model_dump_json(indent=1))
        current = {part.file for part in result.parts}
        for name in places.sizes(folder):
            if name.endswith(".safetensors") and not name.startswith(".") and name not in current:
                places.remove(folder / name)

    def remove_drafts(self) -> None:
        """Delete what killed writers left unfinished, here and in the chains; nobody may be writing."""
        for part in ("layers", "measures", "sequential", "variants"):
            for draft in (self.directory / part).rglob(".*"):
                draft.unlink(missing_ok=True)

    def remove_statistics(self) -> None:
        """Delete the statistics of this candidate, of whatever inputs."""
        places.discard(self.directory / "statistics")

    def remove_layers(self) -> None:
        """Delete the layers' files; the assembled variants stay."""
        places.discard(self.directory / "layers")


def chain_directory(out: str, recipe: Recipe) -> Path:
    """The workspace of one recipe's chain (:mod:`compression.sequential`) below that of its candidate."""
    return Path(out) / "sequential" / recipe.name


def inputs_hash(source: str, recipes: Sequence[Recipe], *others: object) -> str:
    """Hash of all that a layer's files are made of: the model's fingerprint, recipes, and ``others`` (JSON-able)."""
    facts = [CODE_VERSION, source, [recipe.model_dump(mode="json") for recipe in recipes], *others]
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
