"""What docs/clusters.md shows: its job is one, and its profiles are read as they stand."""

import re
from pathlib import Path

import yaml

from launcher.backends.slurm import render_job, slurm_job
from launcher.journal import Journal
from launcher.planning.clusters import cluster_of
from launcher.profiles import load_profiles
from launcher.spec import load_spec, parse_spec

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")


def _block(kind: str) -> str:
    (block,) = re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)
    return str(block)


def test_the_page_s_job_is_one_for_two_nodes(tmp_path: Path) -> None:
    spec = parse_spec(yaml.safe_load(_block("yaml")))
    cluster = cluster_of(spec, tmp_path)
    assert (cluster.devices, cluster.devices_per_node) == (4, 2)
    assert spec.candidates[0].layout is not None
    assert spec.candidates[0].layout.world_size == cluster.devices


def test_the_page_s_profiles_are_read_and_go_into_the_script(tmp_path: Path) -> None:
    (tmp_path / "profiles.yaml").write_text(_block("yaml profiles"), encoding="utf-8")
    profiles = load_profiles(tmp_path)
    assert set(profiles) == {"default", "lab"}
    assert profiles["lab"].ray is not None
    spec = load_spec(ROOT / "examples" / "slurm.yaml")
    lab = spec.model_copy(update={"execution": spec.execution.model_copy(update={"profile": "lab"})})
    script = render_job(lab, tmp_path, slurm_job(lab, Journal(tmp_path / "jobs" / "x"), "x", tmp_path))
    told = (
        "--container-image=/images/espalier.sqsh",
        "ulimit -l unlimited",
        "/opt/espalier/bin/python -m launcher.ray_node",
    )
    assert [line in script for line in told] == [True] * 3
    assert "PYTHONPATH" not in script


def test_every_field_that_the_page_names_exists() -> None:
    from launcher.backends.slurm_options import SlurmOptions

    named = {"gpus_per_node", "memory_gib_per_node", "account", "qos", "constraint", "checkpoint_seconds"}
    assert named <= set(SlurmOptions.model_fields)
    assert all(f"`{name}`" in PAGE for name in named)
