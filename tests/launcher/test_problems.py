"""Errors name the field, the value and what would work."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from launcher.problems import of_validation, of_yaml
from launcher.spec import JobSpec

GOOD: dict[str, Any] = {
    "name": "x",
    "data": {"train": ["builtin:python-stdlib"]},
    "budget": {"tokens": 1e6},
    "candidates": [{"name": "a", "model": {"family": "gpt"}}],
}


def broken(change: Callable[[dict[str, Any]], object]) -> list[str]:
    document = copy.deepcopy(GOOD)
    change(document)
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate(document)
    return [str(problem) for problem in of_validation(caught.value, JobSpec)]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d.update(budgte=1), "budgte: unknown field; did you mean 'budget'?"),
        (
            lambda d: d["candidates"][0].update(layout={"tensr": 2}),
            "candidates.0.layout.tensr: unknown field; did you mean 'tensor'?",
        ),
        (lambda d: d.pop("data"), "data: is missing; the field is required"),
        (lambda d: d["budget"].update(tokens=-1), "budget.tokens: -1: should be greater than 0"),
        (
            lambda d: d["candidates"][0].update(training={"learning_rate": "fast"}),
            "candidates.0.training.learning_rate: \"fast\": should be a valid number or 'auto'",
        ),
        (
            lambda d: d.update(name="A b"),
            "name: \"A b\": should match pattern '^[a-z0-9][a-z0-9._-]{0,62}$'; use small letters, digits, ",
        ),
        (lambda d: d.update(candidates=[]), "candidates: should have at least 1 item, not 0"),
        (
            lambda d: d.update(compression={"prune": {"methods": ["magic"], "sparsity": [0.5]}}),
            "compression.prune.methods.0: \"magic\": unknown pruning method 'magic': available are ",
        ),
    ],
)
def test_one_line_with_field_and_remedy(change: Callable[[dict[str, Any]], object], expected: str) -> None:
    (line,) = broken(change)
    assert line.startswith(expected)


def test_unknown_field_far_from_all_lists_the_known_ones() -> None:
    (line,) = broken(lambda d: d["data"].update(zzz=1))
    assert line.startswith("data.zzz: unknown field; available: documents, field, kind, ")


def test_every_wrong_field_has_its_own_line() -> None:
    lines = broken(lambda d: d.update(seed="x", version=2))
    assert [line.partition(":")[0] for line in lines] == ["version", "seed"]


def test_long_values_are_cut() -> None:
    (line,) = broken(lambda d: d.update(seed="9x" * 500))
    assert len(line) < 150


def test_yaml_errors_name_line_and_column() -> None:
    with pytest.raises(yaml.YAMLError) as caught:
        yaml.safe_load("a: 1\nb: [1, 2\nc: 3\n")
    assert str(of_yaml(caught.value, "job.yaml")).startswith('"job.yaml": line 3, column 2: not valid YAML: ')
