"""Our engine on a list of recipes, in one process without a cluster: the other side of ``peer.py``.

The seconds are those from before the model is read until every variant's file is written. One line of JSON per run:
all recipes together with shared statistics, one GPTQ recipe alone, and all with statistics of their own (sequential).

    python engine.py WORK RECIPES.json together|NAME|sequential
"""

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from compression import tasks
from compression.recipe import Recipe
from compression.source import read_source
from compression.text import CalibrationText, shards


def main() -> None:
    """Compress, then evaluate."""
    work, mode = Path(sys.argv[1]), sys.argv[3]
    recipes = {name: Recipe(**document) for name, document in json.loads(Path(sys.argv[2]).read_text()).items()}
    facts = json.loads((work / "facts.json").read_text())
    source, text = str(work / "model"), CalibrationText(**facts["calibration"])
    chosen = [recipes[mode]] if mode in recipes else list(recipes.values())
    with tempfile.TemporaryDirectory() as out:
        started = time.monotonic()
        compress = sequential if mode == "sequential" else together
        variants = compress(source, chosen, text, out)
        seconds = time.monotonic() - started
        length, seed = text.sequence_length, text.seed
        qualities = tasks.evaluate(variants, text.data_dir, length, facts["held_out"] * length, seed)
    print(json.dumps({"seconds": seconds, "perplexity": {row.name: row.perplexity for row in qualities}}))


def together(source: str, recipes: list[Recipe], text: CalibrationText, out: str) -> list[str]:
    """One calibration, and all recipes of a layer at once."""
    layers = range(read_source(source).config.layers)
    if any(recipe.needs_statistics for recipe in recipes):
        for layer in layers:
            for shard in range(len(shards(text.sequences))):
                tasks.calibrate(source, layer, shard, text, out)
    for layer in layers:
        tasks.compress_layer(source, layer, recipes, out, text=text, keep_statistics=False)
    tasks.compress_outer(source, recipes, out)
    return [tasks.assemble(source, recipe, out).path for recipe in recipes]


def sequential(source: str, recipes: list[Recipe], text: CalibrationText, out: str) -> list[str]:
    """A chain per recipe."""
    tasks.compress_outer(source, recipes, out)
    for recipe in recipes:
        for layer in range(read_source(source).config.layers):
            tasks.compress_next(source, layer, recipe, out, text=text)
    return [tasks.assemble(source, recipe, out, sequential=True).path for recipe in recipes]


if __name__ == "__main__":
    main()
