"""Specs that cannot run: each is refused before anything starts, with field, value and a remedy."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.planning.cluster import Cluster
from launcher.planning.validate import check
from launcher.problems import Problem, SpecError
from launcher.spec import parse_spec
from parallelism import places
from parallelism.objects import ObjectTree
from tests.launcher.made import cpus

TEXT = "def square(number):\n    return number * number\n\n\n" * 400

GOOD: dict[str, Any] = {
    "name": "sound",
    "data": {"train": ["TEXT"], "validation": 0.1, "documents": "passage", "tokenizer": {"kind": "bytes"}},
    "budget": {"tokens": 1e6},
    "candidates": [
        {"name": "small", "model": {"layers": 4, "hidden": 64, "heads": 4}},
        {"name": "large", "model": {"layers": 6, "hidden": 96, "heads": 6, "kv_heads": 3}},
    ],
    "compression": {"quantize": {"methods": ["rtn"], "bits": [8, 4], "group_size": 32}},
}
GOOD["data"]["sequence_length"] = 64


def changed(tmp_path: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """The sound spec with the values at the dotted paths replaced; ``TEXT`` stands for a small corpus."""
    (tmp_path / "text.py").write_text(TEXT, encoding="utf-8")
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    document = copy.deepcopy(GOOD)
    for path, value in changes.items():
        *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
        here: Any = document
        for part in parents:
            here = here[part] if isinstance(here, list) else here.setdefault(part, {})
        here[last] = value
    return replaced(document, {"TEXT": str(tmp_path / "text.py"), "TMP": str(tmp_path)})


def replaced(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: replaced(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [replaced(inner, names) for inner in value]
    if isinstance(value, str):
        for name, path in names.items():
            value = value.replace(name, path)
    return value


def problems(document: Any, home: Path, machine: Cluster | None = None) -> list[Problem]:
    """Everything that reading and checking the document brings up."""
    with pytest.raises(SpecError) as caught:
        check(parse_spec(document), machine or cpus(4, 4.0), home)
    return caught.value.problems


def test_the_sound_spec_is_sound(tmp_path: Path) -> None:
    plan = check(parse_spec(changed(tmp_path, {})), cpus(4, 4.0), tmp_path / "home")
    assert [candidate.name for candidate in plan.candidates] == ["small", "large"]
    assert plan.variants == 6
    assert not (tmp_path / "home").exists()


@dataclass(frozen=True)
class Broken:
    """Changes to the sound spec, and the problem that they must bring: field, part of its value, part of the text."""

    name: str
    changes: dict[str, Any]
    field: str
    value: str
    remedy: str


NVME = {"engine": "deepspeed", "zero_stage": 3, "offload": "nvme"}

BROKEN = [
    # Wrong types and values
    Broken("text for a number", {"seed": "abc"}, "seed", "abc", "valid integer"),
    Broken("half a layer", {"candidates.0.model.layers": 2.5}, "candidates.0.model.layers", "2.5", "whole number"),
    Broken("no layers", {"candidates.0.model.layers": 0}, "candidates.0.model.layers", "0", "greater than 0"),
    Broken("negative seed", {"seed": -1}, "seed", "-1", "greater than or equal to 0"),
    Broken("a number for a list", {"data.train": "TEXT"}, "data.train", "text.py", 'write it as a list: ["'),
    Broken("a list for a mapping", {"budget": [1]}, "budget", "", "write it as a mapping"),
    Broken("version of tomorrow", {"version": 2}, "version", "2", "should be 1"),
    Broken("infinite budget", {"budget.tokens": float("inf")}, "budget.tokens", "inf", "finite number"),
    Broken("negative budget", {"budget.tokens": -5}, "budget.tokens", "-5", "greater than 0"),
    Broken("bad name", {"name": "Über Job"}, "name", "Über Job", "use small letters, digits"),
    Broken(
        "sparsity 1",
        {"compression.prune": {"methods": ["magnitude"], "sparsity": [1.0]}},
        "compression.prune.sparsity.0",
        "1.0",
        "less than 1",
    ),
    Broken(
        "one bit", {"compression.quantize.bits": [1]}, "compression.quantize.bits.0", "1", "should be 8, 6, 4, 3 or 2"
    ),
    Broken(
        "unknown method",
        {"compression.quantize.methods": ["rnt"]},
        "compression.quantize.methods.0",
        "rnt",
        "available are",
    ),
    Broken("no candidates", {"candidates": []}, "candidates", "", "at least 1 item"),
    Broken(
        "schedule misspelt",
        {"candidates.0.training.schedule": "cosin"},
        "candidates.0.training.schedule",
        "cosin",
        "did you mean 'cosine'?",
    ),
    # Names
    Broken("unknown field", {"compresion": {}}, "compresion", "", "did you mean 'compression'?"),
    Broken(
        "misspelt layout",
        {"candidates.0.layout": {"tenser": 2}},
        "candidates.0.layout.tenser",
        "",
        "did you mean 'tensor'?",
    ),
    Broken(
        "misspelt model field",
        {"candidates.0.model.hiden": 64},
        "candidates.0.model.hiden",
        "64",
        "did you mean 'hidden'?",
    ),
    Broken(
        "unknown preset",
        {"candidates.0.model": {"preset": "gpt2-xll"}},
        "candidates.0.model.preset",
        "gpt2-xll",
        "did you mean 'gpt2-xl'?",
    ),
    Broken(
        "unknown family",
        {"candidates.0.model.family": "gptt"},
        "candidates.0.model.family",
        "gptt",
        "did you mean 'gpt'?",
    ),
    Broken(
        "unknown engine",
        {"candidates.0.layout": {"engine": "megatorn"}},
        "candidates.0.layout.engine",
        "megatorn",
        "did you mean 'megatron'?",
    ),
    Broken("unknown back-end", {"execution.backend": "locale"}, "execution.backend", "locale", "did you mean 'local'?"),
    Broken("unknown profile", {"execution.profile": "root"}, "execution.profile", "root", "available: default"),
    Broken("same name twice", {"candidates.1.name": "small"}, "candidates", "", "give every candidate its own name"),
    # Budgets
    Broken("two budgets", {"budget.flops": 1e12}, "budget", "", "give exactly one of flops, tokens"),
    Broken("no budget", {"budget": {}}, "budget", "", "give exactly one of"),
    Broken("cost without a price", {"budget": {"cost": 3.0}}, "execution", "", "give price_per_device_hour"),
    Broken(
        "budget below one step", {"budget.tokens": 63}, "candidates.0.training.global_batch", "1", "raise budget.tokens"
    ),
    Broken(
        "clock shorter than the start",
        {"budget": {"wall_clock": 2}},
        "candidates.0.training.global_batch",
        "1",
        "raise budget.wall_clock",
    ),
    # Models
    Broken(
        "hidden not divisible by heads",
        {"candidates.0.model.heads": 5},
        "candidates.0.model",
        "",
        "hidden 64 is not divisible by heads 5: change one",
    ),
    Broken(
        "heads not divisible by kv_heads",
        {"candidates.0.model.kv_heads": 3},
        "candidates.0.model",
        "",
        "heads 4 is not divisible by kv_heads 3",
    ),
    Broken(
        "context shorter than the sequences",
        {"candidates.0.model.context": 32},
        "candidates.0.model.context",
        "32",
        "lower data.sequence_length",
    ),
    Broken(
        "vocabulary smaller than the tokenizer's",
        {"candidates.0.model.vocab_size": 100},
        "candidates.0.model.vocab_size",
        "100",
        "leave vocab_size out",
    ),
    Broken(
        "too big for the memory",
        {"candidates.1.model": {"preset": "llama-2-70b"}},
        "candidates.1.model",
        "",
        "use 1024 such devices",
    ),
    # Layouts
    Broken(
        "more devices than there are",
        {"candidates.0.layout": {"tensor": 4, "data": 2}},
        "candidates.0.layout",
        "T4×P1×D2",
        "run on 8 devices",
    ),
    Broken(
        "heads not divisible by tensor",
        {"candidates.0.layout": {"tensor": 3}},
        "candidates.0.layout.tensor",
        "3",
        "possible for this model: 1, 2, 4",
    ),
    Broken(
        "kv_heads not divisible by tensor",
        {"candidates.1.layout": {"tensor": 2}},
        "candidates.1.layout.tensor",
        "2",
        "does not divide kv_heads 3; possible for this model: 1",
    ),
    Broken(
        "more stages than layers",
        {"candidates.0.model.layers": 2, "candidates.0.layout": {"pipeline": 3}},
        "candidates.0.layout.pipeline",
        "3",
        "use 2 or fewer",
    ),
    Broken(
        "layers not divisible by virtual stages",
        {"candidates.1.layout": {"pipeline": 2, "virtual_pipeline": 2}, "candidates.1.training.global_batch": 4},
        "candidates.1.layout.virtual_pipeline",
        "2",
        "possible: 1, 3",
    ),
    Broken(
        "virtual stages without a pipeline",
        {"candidates.0.layout": {"virtual_pipeline": 2}},
        "candidates.0.layout",
        "",
        "raise pipeline",
    ),
    Broken(
        "interleaving with too few micro-batches",
        {
            "candidates.0.layout": {"pipeline": 2, "virtual_pipeline": 2},
            "candidates.0.training": {"global_batch": 9, "micro_batch": 3},
        },
        "candidates.0.training.global_batch",
        "9",
        "leave virtual_pipeline out",
    ),
    Broken(
        "batch not divisible by data",
        {"candidates.0.layout": {"data": 4}, "candidates.0.training.global_batch": 6},
        "candidates.0.training.global_batch",
        "6",
        "use 8 or another multiple of 4",
    ),
    Broken(
        "micro-batch does not divide the batch",
        {"candidates.0.training": {"global_batch": 8, "micro_batch": 3}},
        "candidates.0.training",
        "",
        "micro_batch 3 does not divide global_batch 8",
    ),
    Broken(
        "sequence parallelism without tensor",
        {"candidates.0.layout": {"sequence_parallel": True}},
        "candidates.0.layout",
        "",
        "raise tensor",
    ),
    Broken(
        "DeepSpeed with a pipeline",
        {"candidates.0.layout": {"engine": "deepspeed", "pipeline": 2}},
        "candidates.0.layout",
        "",
        "set pipeline: 1 or engine: megatron",
    ),
    Broken(
        "ZeRO without DeepSpeed",
        {"candidates.0.layout": {"zero_stage": 2}},
        "candidates.0.layout",
        "",
        "need engine: deepspeed",
    ),
    Broken(
        "lean with accumulation",
        {"candidates.0.layout": {"engine": "lean"}, "candidates.0.training": {"global_batch": 8, "micro_batch": 2}},
        "candidates.0.training.micro_batch",
        "2",
        "no gradient accumulation",
    ),
    Broken(
        "lean in bf16",
        {"candidates.0.layout": {"engine": "lean"}, "candidates.0.training.precision": "bf16"},
        "candidates.0.training.precision",
        "bf16",
        "set training.precision: fp32",
    ),
    Broken(
        "an optimizer's directory below a file",
        {"candidates.0.layout": NVME | {"offload_dir": "TMP/text.py/swap"}},
        "candidates.0.layout.offload_dir",
        "text.py/swap",
        "is no directory that can be written to; name another directory on a local disk, or set layout.offload: cpu",
    ),
    # Data
    Broken("missing file", {"data.train": ["TMP/nowhere.txt"]}, "data.train.0", "nowhere.txt", ""),
    Broken("empty corpus", {"data.train": ["TMP/empty.txt"]}, "data.train", "empty.txt", ""),
    Broken("pattern without a match", {"data.train": ["TMP/*.nothing"]}, "data.train.0", "*.nothing", ""),
    Broken("protocol not allowed", {"data.train": ["ssh://host/file.txt"]}, "data.train.0", "ssh://", ""),
    Broken(
        "vocabulary too large",
        {"data.tokenizer": {"kind": "bpe", "vocab_size": 50000}},
        "data.tokenizer.vocab_size",
        "50000",
        "ask for",
    ),
    Broken(
        "not a tokenizer",
        {"data.tokenizer": {"kind": "file", "path": "TMP/tokenizer.json"}},
        "data.tokenizer.path",
        "tokenizer.json",
        "tokenizer",
    ),
    Broken("unknown built-in corpus", {"data.train": ["builtin:stdlib"]}, "data", "", "available is python-stdlib"),
    Broken(
        "sequences longer than the text",
        {"data.sequence_length": 100_000},
        "data.train",
        "text.py",
        "lower data.sequence_length",
    ),
    Broken("nothing held out", {"data.validation": 0.0}, "data", "", "fraction between 0 and 1"),
    # Compression and execution
    Broken(
        "groups that do not divide the columns",
        {"compression.quantize.group_size": 48},
        "compression.quantize.group_size",
        "48",
        "use 32, 16, 8, or leave it out",
    ),
    Broken(
        "groups that do not divide what a structure leaves",
        {"compression.structure": {"neurons": [0.4]}, "compression.combine": True},
        "compression.quantize.group_size",
        "32",
        "the 112 columns of layers.0.mlp.down.weight after neurons-s40 (candidate 'small'); use 16, 8, or leave it out",
    ),
    Broken(
        "a pattern that does not divide the columns",
        {"compression.prune": {"methods": ["magnitude"], "patterns": ["2:5"]}},
        "compression.prune.patterns",
        "2:5",
        "the 64 columns of layers.0.attention.q.weight (candidate 'small'); use an n:m whose m divides",
    ),
    Broken(
        "a pattern by columns with their order changed",
        {
            "compression.prune": {"methods": ["sparsegpt"], "patterns": ["2:4"]},
            "compression.quantize": {"methods": ["gptq"], "bits": [4], "act_order": True},
            "compression.combine": True,
        },
        "compression.quantize.act_order",
        "True",
        "set act_order to false, or prune by another method",
    ),
    Broken(
        "a size that no width meets",
        {"compression.quantize.target_bytes": [20000]},
        "compression.quantize.target_bytes",
        "20000",
        "the size at 2 bits everywhere",
    ),
    Broken(
        "recovery of a recipe that is not there",
        {"compression.recover": {"budget_fraction": 0.1, "recipes": ["rtn-w8g32", "rtn-w4g23"]}},
        "compression.recover.recipes.1",
        "rtn-w4g23",
        "did you mean 'rtn-w4g32'?",
    ),
    Broken(
        "recovery of what is recovered",
        {"compression.recover": {"budget_fraction": 0.1, "recipes": ["rtn-w8g32-recovered"]}},
        "compression.recover.recipes.0",
        "recovered",
        "did you mean 'rtn-w8g32'?",
    ),
    Broken(
        "two strengths of one name",
        {"compression.prune": {"methods": ["magnitude", "wanda"], "sparsity": [0.5, 0.5000001]}},
        "compression.prune.sparsity",
        "0.5000001",
        "makes a second recipe called wanda-s50; name every method and strength once",
    ),
    Broken(
        "two structures of one name",
        {"compression.structure": {"heads": [0.25, 0.25000001]}},
        "compression.structure.heads",
        "0.25000001",
        "makes a second recipe called heads-s25",
    ),
    Broken(
        "tasks in a folder that is not there",
        {"evaluation.harness": {"tasks": ["brackets"], "include": "TMP/nowhere"}},
        "evaluation.harness.include",
        "nowhere",
        "name a folder of task files",
    ),
    Broken(
        "the harness without exports",
        {"evaluation.harness": {"tasks": ["brackets"]}, "export": {"variants": "none"}},
        "export.variants",
        "none",
        "or leave evaluation.harness out",
    ),
    Broken(
        "more devices asked for than there are", {"execution.devices": 64}, "execution.devices", "64", "use 4 or fewer"
    ),
    Broken(
        "more threads than cores",
        {"execution.threads_per_rank": 4096},
        "execution.threads_per_rank",
        "4096",
        "or fewer",
    ),
]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_broken_specs_are_refused(broken: Broken, tmp_path: Path) -> None:
    found = problems(changed(tmp_path, broken.changes), tmp_path / "home")
    matching = [problem for problem in found if problem.field == broken.field]
    assert matching, f"no problem at {broken.field}: {[str(problem) for problem in found]}"
    assert any(broken.value in str(problem.value) for problem in matching), matching
    assert any(broken.remedy in problem.message for problem in matching), [str(problem) for problem in matching]
    assert not (tmp_path / "home").exists()


def test_there_are_enough_of_them() -> None:
    assert len({broken.name for broken in BROKEN}) == len(BROKEN) >= 30


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_messages_are_one_line_and_say_what_to_do(broken: Broken, tmp_path: Path) -> None:
    for problem in problems(changed(tmp_path, broken.changes), tmp_path / "home"):
        text = str(problem)
        assert "\n" not in text
        assert text.startswith(f"{problem.field}: ")
        assert len(text) > len(problem.field) + 15
        assert "pydantic" not in text


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    document = changed(
        tmp_path,
        {
            "candidates.0.model.hiden": 1,
            "candidates.1.layout": {"tensor": 2, "data": 4},
            "compression.quantize.group_size": 7,
            "execution.backend": "cloud",
            "data.train": ["TMP/nowhere.txt"],
        },
    )
    fields = {problem.field for problem in problems(document, tmp_path / "home")}
    assert fields == {
        "candidates.0.model.hiden",
        "candidates.1.layout",
        "candidates.1.layout.tensor",
        "compression.quantize.group_size",
        "execution.backend",
        "data.train.0",
    }


def test_a_recipe_is_complained_of_once_for_each_model(tmp_path: Path) -> None:
    """Thirteen recipes have the group, and eight of them the pattern; both models have columns that they do not fit."""
    changes = {
        "compression.quantize": {"methods": ["rtn", "gptq"], "bits": [8, 4], "group_size": 40},
        "compression.prune": {"methods": ["wanda", "magnitude"], "patterns": ["5:7"]},
        "compression.combine": True,
    }
    found = problems(changed(tmp_path, changes), tmp_path / "home")
    fields = [problem.field for problem in found]
    assert sorted(fields) == ["compression.prune.patterns"] * 2 + ["compression.quantize.group_size"] * 2
    assert all(f"candidate '{name}'" in str(found) for name in ("small", "large"))


def test_a_size_is_not_judged_by_a_vocabulary_that_nobody_knows(tmp_path: Path) -> None:
    document = changed(tmp_path, {"compression.quantize.target_bytes": [300_000]})
    document["candidates"].pop()
    check(parse_spec(document), cpus(4, 4.0), tmp_path / "home")
    document["data"]["tokenizer"] = {"kind": "file", "path": str(tmp_path / "tokenizer.json")}
    (problem,) = problems(document, tmp_path / "home")
    assert problem.field == "data.tokenizer.path"


def test_a_candidate_keeps_its_place_where_one_before_it_has_no_model(tmp_path: Path) -> None:
    document = changed(tmp_path, {"candidates.0.model": {"preset": "none"}, "candidates.1.layout": {"pipeline": 9}})
    assert {problem.field for problem in problems(document, tmp_path / "home")} == {
        "candidates.0.model.preset",
        "candidates.1.layout",
        "candidates.1.layout.pipeline",
    }


def test_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.planning.validate.shutil.disk_usage", lambda path: _Usage(free=1_000_000))
    (problem,) = problems(changed(tmp_path, {}), tmp_path / "home")
    assert problem.field == "execution.checkpoint_every.keep"
    assert problem.value == 2
    assert "0.00 GiB are free" in problem.message
    assert "choose another --home, lower execution.checkpoint_every.keep" in problem.message


@pytest.mark.parametrize(("backend", "told"), [("local", ["copies of what is in the object store"]), ("ray", [])])
def test_a_disk_that_has_no_room_for_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, told: list[str]
) -> None:
    """Of what is in a store, a machine holds a little; other machines' disks are not known."""
    home = tmp_path / "home"
    profile = {"ray": {"address": "http://head:8265", "cpus_per_node": 4}}
    home.mkdir()
    (home / "profiles.yaml").write_text(yaml.safe_dump({"default": profile}), encoding="utf-8")
    document = changed(tmp_path, {"execution.backend": backend})
    plan = check(parse_spec(document), cpus(4, 4.0), home)
    places.mirror(home / "jobs", ObjectTree("memory://jobs-and-copies"))
    one_each = plan.calibration_bytes + sum(candidate.checkpoint_bytes for candidate in plan.candidates)
    assert one_each < plan.disk_bytes / 2
    for share, expected in ((1.1, []), (0.9, told)):
        free = int(share * one_each / 0.95)
        monkeypatch.setattr("launcher.planning.validate.shutil.disk_usage", lambda path, free=free: _Usage(free=free))
        try:
            check(parse_spec(document), cpus(4, 4.0), home)
            found = []
        except SpecError as error:
            found = [problem.message for problem in error.problems]
        assert len(found) == len(expected)
        assert all(part in text for part, text in zip(expected, found, strict=True))


def test_an_optimizers_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies on the disk of the home here, which holds the rest of the job as well."""
    layout, home = NVME | {"offload_dir": str(tmp_path / "swap")}, tmp_path / "home"
    document = changed(tmp_path, {"candidates.0.layout": layout, "candidates.1.layout": layout})
    plan = check(parse_spec(document), cpus(4, 4.0), home)
    sizes = [candidate.offload_bytes for candidate in plan.candidates]
    assert sizes == [28 * candidate.parameters for candidate in plan.candidates]
    enough_for_one = int((plan.disk_bytes + max(sizes)) / 0.95) + 1000
    monkeypatch.setattr("launcher.planning.validate.shutil.disk_usage", lambda path: _Usage(free=enough_for_one))
    found = problems(document, home)
    assert [problem.field for problem in found] == [f"candidates.{place}.layout.offload_dir" for place in (0, 1)]
    assert all("of which the rest of the job takes" in problem.message for problem in found)
    check(parse_spec(document), cpus(1, 4.0), home)  # one after the other, each has it for itself
    assert not (tmp_path / "swap").exists()


@dataclass(frozen=True)
class _Usage:
    free: int


def test_a_home_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("not a directory", encoding="utf-8")
    (problem,) = problems(changed(tmp_path, {}), tmp_path / "home")
    assert "is a file, not a directory; choose another --home" in problem.message


def test_memory_decides_with_the_cluster(tmp_path: Path) -> None:
    document = changed(tmp_path, {"candidates.1.model": {"preset": "gpt2-medium"}})
    assert check(parse_spec(document), cpus(4, 4.0), tmp_path / "home").candidates[1].layout.world_size > 1
    (problem,) = problems(document, tmp_path / "home", cpus(1, 1.5))
    assert problem.field == "candidates.1.model"
    assert "such devices" in problem.message
