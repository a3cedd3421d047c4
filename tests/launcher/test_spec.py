"""Reading job files: what is accepted, and that every fault is said with its place."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from launcher.problems import SpecError
from launcher.spec import ExecutionConfig, JobSpec, load_spec, parse_spec
from tests.launcher.made import spec_document

ROOT = Path(__file__).resolve().parents[2]

MINIMAL = """
name: tiny
data: {train: ["builtin:python-stdlib"]}
budget: {flops: 1e12}
candidates:
  - name: one
    model: {layers: 1, hidden: 16, heads: 2}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def faults(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load_spec(written(tmp_path, text))
    return [str(problem) for problem in caught.value.problems]


def test_a_minimal_job_gets_defaults(tmp_path: Path) -> None:
    spec = load_spec(written(tmp_path, MINIMAL))
    assert (spec.version, spec.seed, spec.data.sequence_length) == (1, 1234, 256)
    assert spec.budget.limit == 1e12  # YAML 1.1 would read 1e12 as text
    assert spec.candidates[0].training.learning_rate == "auto"
    assert spec.candidates[0].layout is None
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.yaml")), ids=lambda path: path.name)
def test_examples_are_valid(path: Path) -> None:
    assert load_spec(path).candidates


def test_json_is_yaml(tmp_path: Path) -> None:
    spec = JobSpec.model_validate(spec_document())
    assert load_spec(written(tmp_path, spec.model_dump_json(indent=1))) == spec


@pytest.mark.parametrize(("text", "number"), [("2e-2", 0.02), ("+1.5E+3", 1500.0), ("3.0e12", 3e12), ("1_0e1", 100.0)])
def test_numbers_with_exponents(tmp_path: Path, text: str, number: float) -> None:
    spec = load_spec(written(tmp_path, MINIMAL + f"    training: {{weight_decay: {text}}}\n"))
    assert spec.candidates[0].training.weight_decay == number


def test_yaml_faults_name_the_line(tmp_path: Path) -> None:
    (line,) = faults(tmp_path, "name: tiny\ndata: {train: [a, b\nbudget: 3\n")
    assert "line 3, column 7: not valid YAML" in line
    assert "correct that line" in line


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    (line,) = faults(tmp_path, MINIMAL + "budget: {flops: 2e12}\n")
    assert "line 8, column 1" in line
    assert "'budget' stands twice" in line


def test_anchors_and_merged_keys_still_work(tmp_path: Path) -> None:
    text = MINIMAL.replace("model: {", "model: &shape {") + "  - name: two\n    model: {<<: *shape, layers: 2}\n"
    models = [candidate.model for candidate in load_spec(written(tmp_path, text)).candidates]
    assert models == [{"layers": 1, "hidden": 16, "heads": 2}, {"layers": 2, "hidden": 16, "heads": 2}]


@pytest.mark.parametrize(("text", "kind"), [("", "empty"), ("- a\n- b\n", "a list"), ("hello", "a str")])
def test_a_job_is_a_mapping(tmp_path: Path, text: str, kind: str) -> None:
    (line,) = faults(tmp_path, text)
    assert f"the document is {kind}, not a mapping; a job is a mapping with name, data" in line


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="name a job file that exists"):
        load_spec(tmp_path / "missing.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(SpecError, match=r"not UTF-8 text \(byte 9\)"):
        load_spec(tmp_path / "latin.yaml")


def test_every_fault_is_said_at_once() -> None:
    document = spec_document(seed=-1, budgte={}, version=2)
    document["candidates"] = [{"name": "A b", "model": {"preset": "gpt2-xl"}, "layout": {"tensor": 0, "data": "x"}}]
    with pytest.raises(SpecError) as caught:
        parse_spec(document)
    fields = {problem.field for problem in caught.value.problems}
    assert fields == {
        "seed",
        "budgte",
        "version",
        "candidates.0.name",
        "candidates.0.layout.tensor",
        "candidates.0.layout.data",
    }


def test_values_and_unions_are_told_in_one_line() -> None:
    document = spec_document()
    document["candidates"][0]["training"] = {"learning_rate": "fast"}
    with pytest.raises(SpecError) as caught:
        parse_spec(document)
    (problem,) = caught.value.problems
    assert problem.value == "fast"
    assert str(problem) == "candidates.0.training.learning_rate: \"fast\": should be a valid number or 'auto'"


def test_long_values_are_cut() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(spec_document(seed="9x" * 500))
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("LD_PRELOAD", "/tmp/mine.so", "LD_PRELOAD may not be set by a job"),
        ("NCCL_NET_PLUGIN", "mine", "NCCL_NET_PLUGIN may not be set by a job"),
        ("NCCL_SOCKET_IFNAMES", "ib0", "NCCL_SOCKET_IFNAME"),
        ("NCCL_SOCKET_IFNAME", "$(reboot)", "is no value for it"),
        ("NCCL_IB_HCA", "", "is no value for it"),
    ],
)
def test_variables_of_ranks_are_network_settings_only(name: str, value: str, told: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(told)):
        ExecutionConfig(environment={name: value})
    assert ExecutionConfig(environment={"NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1"}).environment["NCCL_IB_HCA"][0] == "="
