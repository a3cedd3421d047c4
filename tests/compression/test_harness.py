"""Tasks of lm-evaluation-harness on exports, from task files and data that are made here."""

from pathlib import Path

import pytest
import torch

from compression import tasks as engine
from compression.compact import CompactFile
from compression.evaluation import logits
from compression.export import export
from compression.harness import HarnessConfig, HarnessError, check_tasks, metrics, score
from compression.recipe import Quantization, Recipe
from tests.compression import made

QUESTIONS = [
    ("a frame is", [" cut", " the"], 0),
    ("the tree grows", [" on", " spring"], 1),
    ("again", [" in", " a"], 0),
]
RECIPES = [Recipe(), Recipe(quantize=Quantization(method="rtn", bits=4, group_size=16))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return made.word_task(tmp_path_factory.mktemp("tasks"), QUESTIONS)


def _variants(folder: Path) -> dict[str, str]:
    config = made.LLAMA.model_copy(update={"vocab_size": 257, "context": 64})
    source = str(made.write_checkpoint(folder / "checkpoint", config, made.weights(config)))
    out = str(folder / "out")
    engine.compress_outer(source, RECIPES, out)
    for layer in range(config.layers):
        engine.compress_layer(source, layer, RECIPES, out)
    return {recipe.name: engine.assemble(source, recipe, out).path for recipe in RECIPES}


def _accuracy(variant: CompactFile) -> float:
    """The task by hand: the choice whose bytes are likelier wins."""
    right = 0
    for text, choices, answer in QUESTIONS:
        likelihoods = []
        for choice in choices:
            tokens = torch.tensor([list((text + choice).encode())])
            found = logits(variant, tokens[:, :-1]).log_softmax(-1)[0]
            likelihoods.append(float(found.gather(1, tokens[0, 1:, None])[len(text) - 1 :].sum()))
        right += likelihoods.index(max(likelihoods)) == answer
    return right / len(QUESTIONS)


@pytest.mark.timeout(300)
def test_exports_are_scored_as_by_hand(tmp_path: Path, folder: str) -> None:
    data, variants = str(made.prepared_text(tmp_path)), _variants(tmp_path)
    directories = {
        name: export(path, str(tmp_path / "exports" / name), data).directory for name, path in variants.items()
    }
    found = score(directories, HarnessConfig(tasks=["words"], include=folder))
    by_hand = {name: {"harness/words/acc": _accuracy(CompactFile(path))} for name, path in variants.items()}
    assert found == by_hand


@pytest.mark.timeout(300)
def test_tasks_are_checked_before_there_is_a_model(folder: str) -> None:
    assert check_tasks(HarnessConfig(tasks=["words"], include=folder)) == ["words"]
    with pytest.raises(HarnessError, match=r"evaluation\.harness\.tasks nowhere: .*nowhere"):
        check_tasks(HarnessConfig(tasks=["nowhere"], include=folder))


def test_a_filter_is_named_where_it_is_not_the_plain_one() -> None:
    row = {"acc,none": 0.5, "acc_stderr,none": "N/A", "exact_match,strict": 1, "alias": "sums"}
    assert metrics({"sums": row}) == {"harness/sums/acc": 0.5, "harness/sums/exact_match/strict": 1.0}
