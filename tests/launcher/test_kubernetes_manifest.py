"""The RayJob of a job: its options, its golden form, KubeRay's schema, and what its scripts do."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from launcher.attend import ask_to_stop, stop_file
from launcher.backends.kubernetes import kubernetes_job, render_job
from launcher.backends.kubernetes_manifest import KubernetesJob, job_name, render, to_yaml
from launcher.backends.kubernetes_options import KubernetesOptions
from launcher.environment import python_environment
from launcher.planning.cluster import GIBI
from launcher.planning.clusters import cluster_of, placement_problems
from launcher.pod import alive_file
from launcher.policy import TEMPORARY_EXIT_CODE
from launcher.problems import SpecError
from launcher.profiles import KubernetesProfile, Scratch, load_profiles
from launcher.spec import JobSpec
from tests.launcher.kubernetes_schema import crd, kuberay_refuses, unknown_fields, wrong_by_crd
from tests.launcher.made import new_journal, spec_document
from tests.services.running import until

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
JOURNAL = "/espalier/jobs/tiny-3fa9c1"
STORED = f"s3://models/tiny-3fa9c1#{JOURNAL}"

JOB = KubernetesJob(
    job_id="tiny-3fa9c1",
    name=job_name("tiny-3fa9c1", JOURNAL, 1),
    journal=JOURNAL,
    entry=f"{{ cd '/espalier/anna'\"'\"'s files' 2> /dev/null || cd {JOURNAL}; }}",
    ray_version="2.60.0",
    threads_per_rank=4,
    environment={"RAY_USAGE_STATS_ENABLED": "0"},
)
ASKED = KubernetesOptions(
    nodes=4,
    gpus_per_node=8,
    cpus_per_node=96,
    memory_gib_per_node=900,
    shared_memory_gib=64,
    queue="research",
    priority_class="low",
    deadline_seconds=86400,
    checkpoint_seconds=300,
)
OPERATORS = KubernetesProfile.model_validate(
    {
        "namespace": "espalier",
        "image": "registry.lab/espalier:0.1.0-cuda",
        "python": "/opt/espalier/bin/python",
        "image_pull_secrets": ["registry"],
        "service_account": "espalier-jobs",
        "run_as_user": 1000,
        "fs_group": 1000,
        "node_selector": {"gpu": "h100"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "volumes": [
            {"claim": "espalier-home", "mount": "/espalier"},
            {"claim": "texts", "mount": "/texts", "read_only": True},
        ],
        "environment": {"NCCL_SOCKET_IFNAME": "eth0"},
        "secret_environment": {"HF_TOKEN": {"secret": "hub", "key": "token"}},
        "secret_mounts": [{"secret": "s3", "mount": "/secrets/s3"}],
        "queue_kind": "kueue",
        "queues": ["research"],
        "priority_classes": ["low"],
    }
)
IN_STORE = replace(
    JOB,
    journal=STORED,
    entry=f"mkdir -p {JOURNAL} && {{ cd /work 2> /dev/null || cd {JOURNAL}; }}",
    copies=Path(JOURNAL).parent,
)
SCRATCH = KubernetesProfile.model_validate(
    {
        "image": "espalier:1",
        "scratch": {"gib": 500, "storage_class": "local-nvme"},
        "environment": {"AWS_ENDPOINT_URL": "https://s3.lab"},
        "secret_environment": {"AWS_SECRET_ACCESS_KEY": {"secret": "store", "key": "password"}},
    }
)
PLAIN = KubernetesProfile.model_validate({"image": "espalier:1", "volumes": [{"claim": "home", "mount": "/espalier"}]})
CASES = {
    "kubernetes-gpus.yaml": (JOB, ASKED, OPERATORS),
    "kubernetes-plain.yaml": (JOB, KubernetesOptions(cpus_per_node=8), PLAIN),
    "kubernetes-objects.yaml": (IN_STORE, KubernetesOptions(nodes=2, cpus_per_node=8), SCRATCH),
    "kubernetes-volcano.yaml": (
        JOB,
        KubernetesOptions(nodes=2, queue="research", priority_class="low"),
        OPERATORS.model_copy(update={"queue_kind": "volcano"}),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_manifest_is_the_golden_one_without_unknown_fields(name: str) -> None:
    manifest = render(*CASES[name])
    text = to_yaml(manifest)
    assert text == (GOLDEN / name).read_text(encoding="utf-8")
    assert yaml.safe_load(text) == manifest
    assert unknown_fields(manifest) == []
    assert kuberay_refuses(manifest) is None


@pytest.mark.parametrize("plural", ["rayjobs", "rayclusters"])
def test_manifests_hold_to_kuberay_s_own_schemas(plural: str) -> None:
    schema = crd(plural)
    if schema is None:
        pytest.skip("KubeRay's schemas do not lie beside the project")
    for case in CASES.values():
        manifest = render(*case)
        if plural == "rayclusters":
            manifest = manifest | {"kind": "RayCluster", "spec": manifest["spec"]["rayClusterSpec"]}
        assert wrong_by_crd(manifest, schema) == []
    misspelt = render(*CASES["kubernetes-plain.yaml"])
    misspelt["spec"]["rayClusterSpec" if plural == "rayjobs" else "headGroupSpec"] = {"headGroupSpecs": {}}
    assert wrong_by_crd(misspelt, schema)


def test_every_pod_is_one_node_of_ray_and_all_are_alike() -> None:
    cluster = render(JOB, ASKED, OPERATORS)["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (3, 3, 3)
    for part in (cluster["headGroupSpec"], group):
        (container,) = part["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert (
            limits == {"cpu": "96", "memory": "921600Mi", "nvidia.com/gpu": "8"} == container["resources"]["requests"]
        )
        assert part["rayStartParams"]["num-gpus"] == "8"
        assert part["template"]["spec"]["volumes"][0]["emptyDir"] == {"medium": "Memory", "sizeLimit": "65536Mi"}
        assert part["template"]["spec"]["terminationGracePeriodSeconds"] > ASKED.checkpoint_seconds
    alone = render(JOB, KubernetesOptions(), PLAIN)["spec"]["rayClusterSpec"]
    assert "workerGroupSpecs" not in alone


def test_nobody_but_the_dispatcher_tries_again_and_kueue_lets_jobs_in() -> None:
    spec = render(JOB, ASKED, OPERATORS)["spec"]
    assert (spec["backoffLimit"], spec["shutdownAfterJobFinishes"], spec["suspend"]) == (0, True, True)
    assert "suspend" not in render(*CASES["kubernetes-volcano.yaml"])["spec"]


def test_secrets_are_named_and_not_held() -> None:
    spec = render(JOB, ASKED, OPERATORS)["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (one,) = [entry for entry in spec["containers"][0]["env"] if entry["name"] == "HF_TOKEN"]
    assert one == {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
    assert spec["automountServiceAccountToken"] is False


def test_names_are_labels_of_kuberay_s_length_and_never_of_two_jobs() -> None:
    longest = "a" * 63 + "-3fa9c1"
    names = {
        job_name(job_id, f"{home}/{job_id}", epoch, attempt)
        for job_id in ("tiny-3fa9c1", "tiny.3fa9c1", "tiny_3fa9c1", longest, longest + "x", "9-lives")
        for home in ("/a", "/b")
        for epoch in (1, 9999)
        for attempt in (1, 99)
    }
    assert len(names) == 48
    for name in names:
        assert kuberay_refuses(replaced_name(name)) is None, name
    assert job_name("tiny", JOURNAL, 3) == job_name("tiny", JOURNAL, 3)


def replaced_name(name: str) -> dict[str, Any]:
    return render(replace(JOB, name=name), KubernetesOptions(), PLAIN)


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ({"nodes": 0}, "greater than 0"),
        ({"queue": "research\nkind: Secret"}, "use small letters"),
        ({"priority_class": "System"}, "use small letters"),
        ({"deadline_seconds": 0}, "greater than 0"),
        ({"image": "x"}, "Extra inputs"),
        ({"volumes": []}, "Extra inputs"),
    ],
)
def test_an_option_that_a_job_may_not_set_is_refused(given: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValidationError, match=remedy):
        KubernetesOptions.model_validate(given)


def _spec(**execution: Any) -> JobSpec:
    return JobSpec.model_validate(spec_document(execution={"backend": "kubernetes", **execution}))


def _home(folder: Path, **profile: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    offer = {"image": "x", "volumes": [{"claim": "home", "mount": str(folder)}], **profile}
    (folder / "profiles.yaml").write_text(yaml.safe_dump({"default": {"kubernetes": offer}}), encoding="utf-8")
    return folder


def _problems(spec: JobSpec, home: Path) -> dict[str, str]:
    return {problem.field: problem.message for problem in placement_problems(spec, home)}


def test_what_a_job_gets_wrong_about_its_place_is_told_with_a_remedy(tmp_path: Path) -> None:
    assert _problems(_spec(), tmp_path) == {
        "execution.profile": '"default": it says of no Kubernetes cluster; the operator adds kubernetes: {image: ...,'
        " volumes: ...} to it in profiles.yaml, or name another profile"
    }
    home = _home(tmp_path / "home", queue_kind="kueue", queues=["a", "b"], memory_gib_per_node=2)
    wrong = {"cpus_per_node": 2, "gpus_per_node": 1, "queue": "c", "priority_class": "high"}
    assert _problems(_spec(threads_per_rank=4, kubernetes=wrong), home) == {
        "execution.kubernetes.cpus_per_node": "2: one rank needs 4 (execution.threads_per_rank); use 4 or more",
        "execution.kubernetes.shared_memory_gib": "2.0: /dev/shm is part of a pod's memory, 2 GiB;"
        " use less, or more memory",
        "execution.kubernetes.queue": '"c": the profile does not offer this queue; use one of a, b',
        "execution.kubernetes.priority_class": '"high": the profile does not offer this priority class; leave it out',
        "execution.profile": '"default": it does not say what the GPUs are; the operator adds kubernetes: {gpu: {name:'
        " ..., memory_gib: ...}} to it in profiles.yaml",
    }
    nowhere = _home(tmp_path / "nowhere", volumes=[{"claim": "home", "mount": "/elsewhere"}])
    assert "no volume of its pods holds the home" in _problems(_spec(), nowhere)["execution.profile"]
    any_queue = _home(tmp_path / "any-queue", queue_kind="kueue")
    assert _problems(_spec(kubernetes={"queue": "a"}), any_queue) == {}
    assert _problems(_spec(), any_queue) == {
        "execution.kubernetes.queue": "Kueue lets in what has a queue; name one: kubectl get localqueues"
    }
    assert _problems(_spec(kubernetes={"queue": "a"}), _home(tmp_path / "plain")) == {
        "execution.kubernetes.queue": '"a": the profile knows no queues; leave it out'
    }


@pytest.mark.parametrize(("installed", "told"), [({"ray"}, True), ({"ray", "kubernetes"}, False), (set(), False)])
def test_the_client_has_to_be_where_jobs_are_dispatched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: set[str], told: bool
) -> None:
    """The API's image has neither: its dispatcher is elsewhere."""
    monkeypatch.setattr("launcher.planning.clusters.find_spec", lambda name: name if name in installed else None)
    found = _problems(_spec(), _home(tmp_path / "home")).get("execution.backend", "")
    assert ("pip install 'espalier-service[kubernetes]'" in found) is told


def test_a_misspelt_profile_is_told_by_its_field(tmp_path: Path) -> None:
    home = _home(tmp_path, tolerations=[{"effect": "Never"}])
    with pytest.raises(SpecError, match=r"default\.kubernetes\.tolerations\.0\.effect"):
        load_profiles(home)


def test_the_planner_sees_the_pods(tmp_path: Path) -> None:
    gpu = {"name": "NVIDIA H100 80GB HBM3", "memory_gib": 80, "host_memory_gib": 1024}
    home = _home(tmp_path, gpu=gpu, memory_gib_per_node=64)
    gpus = cluster_of(_spec(kubernetes={"nodes": 2, "gpus_per_node": 8}), home)
    assert (gpus.device_kind, gpus.devices, gpus.memory_bytes_per_device) == ("gpu", 16, 80 * GIBI)
    cpus = cluster_of(_spec(threads_per_rank=4, kubernetes={"nodes": 3, "cpus_per_node": 16}), home)
    assert (cpus.device_kind, cpus.devices, cpus.memory_bytes_per_device) == ("cpu", 12, 16 * GIBI)


def test_copies_of_what_is_in_a_store_are_on_a_volume_that_goes_with_the_pod() -> None:
    def copies(profile: KubernetesProfile, job: KubernetesJob = IN_STORE) -> list[dict[str, Any]]:
        spec = render(job, KubernetesOptions(), profile)["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        mounts = [one["mountPath"] for one in spec["containers"][0]["volumeMounts"] if one["name"] == "copies"]
        found = [one for one in spec["volumes"] if one["name"] == "copies"]
        assert mounts == [str(Path(JOURNAL).parent)] * len(found)
        return found

    plain = KubernetesProfile(image="x")
    assert copies(plain) == [{"name": "copies", "emptyDir": {}}]
    limited = plain.model_copy(update={"scratch": Scratch(gib=2)})
    assert copies(limited) == [{"name": "copies", "emptyDir": {"sizeLimit": "2048Mi"}}]
    assert copies(PLAIN) == copies(plain, JOB) == []  # a volume holds them; nothing is copied


COORDINATOR = """
import sys, time
from pathlib import Path
folder, told = Path({folder!r}), sys.argv[1:]
{body}
"""


class Pod:
    """Runs what a rendered RayJob would run in its head's pod; ``coordinator`` is what runs there, as Python."""

    def __init__(self, folder: Path, coordinator: str) -> None:
        self.journal = new_journal(folder / "home" / "jobs", execution={"backend": "kubernetes"})
        (folder / "bin").mkdir()
        (folder / "bin" / "ray").write_text(f"#!/bin/sh\ntouch {folder}/stopped\n", encoding="utf-8")
        (folder / "bin" / "ray").chmod(0o755)
        text = COORDINATOR.format(folder=str(folder), body=coordinator)
        (folder / "in_place_of_a_coordinator.py").write_text(text, encoding="utf-8")
        self.environment = python_environment() | {"PATH": f"{folder}/bin:{os.environ['PATH']}"}
        job = kubernetes_job(
            self.journal.spec(), self.journal, "job-1", "esp-x-e1", folder, "in_place_of_a_coordinator"
        )
        self.stop_file = stop_file(self.journal, job.name)
        manifest = render_job(self.journal.spec(), PLAIN.model_copy(update={"python": sys.executable}), job)
        self.entrypoint = manifest["spec"]["entrypoint"]
        template = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
        self.before_the_end = template["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]

    def start(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(["/bin/sh", "-c", self.entrypoint], env=self.environment)


def test_the_entrypoint_tells_how_the_coordinator_ended_and_leaves_nothing(tmp_path: Path) -> None:
    pod = Pod(tmp_path, "print(*told); sys.exit(3)")
    ask_to_stop(pod.stop_file)  # of a life before a suspension
    assert pod.start().wait(20) == 3
    assert not alive_file(pod.stop_file).exists()
    told = pod.journal.log_path("coordinator").read_text(encoding="utf-8")
    assert told.strip() == f"{pod.journal.directory} --address auto --nodes 1"


def test_a_life_that_was_cut_off_is_not_followed_by_another_of_the_same_submission(tmp_path: Path) -> None:
    pod = Pod(tmp_path, "time.sleep(60)")
    cut_off = pod.start()
    until(alive_file(pod.stop_file).exists, 20)
    cut_off.kill()
    cut_off.wait()
    assert pod.start().wait(20) == TEMPORARY_EXIT_CODE
    assert "cut off" in pod.journal.log_path("coordinator").read_text(encoding="utf-8")
    assert not alive_file(pod.stop_file).exists()


def test_a_pod_that_has_to_go_waits_for_checkpoints(tmp_path: Path) -> None:
    body = """
import signal
def save(*_):
    time.sleep(1)
    (folder / "saved").touch()
    sys.exit(3)
signal.signal(signal.SIGTERM, save)
(folder / "up").touch()
time.sleep(60)
"""
    pod = Pod(tmp_path, body)
    runs = pod.start()
    until((tmp_path / "up").exists, 20)
    runs.terminate()  # everybody in the pod is sent that, and the coordinator must not hear it twice
    subprocess.run(pod.before_the_end, env=pod.environment, timeout=20, check=True)
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "stopped").exists()
    assert runs.wait(20) == 3
    subprocess.run(pod.before_the_end, env=pod.environment, timeout=10, check=True)  # nothing to wait for


def test_a_folder_that_pods_do_not_have_is_done_without_and_a_volume_that_is_missing_is_not(tmp_path: Path) -> None:
    pod = Pod(tmp_path, "print(Path.cwd())")
    spec = pod.journal.spec()
    profile = PLAIN.model_copy(update={"python": sys.executable})
    job = kubernetes_job(
        spec, pod.journal, "job-1", "esp-x-e1", tmp_path / "submitted-here", "in_place_of_a_coordinator"
    )
    entrypoint = ["/bin/sh", "-c", render_job(spec, profile, job)["spec"]["entrypoint"]]
    environment = pod.environment | {"PYTHONPATH": f"{pod.environment['PYTHONPATH']}:{tmp_path}"}
    assert subprocess.run(entrypoint, env=environment, timeout=60, check=False).returncode == 0
    assert str(pod.journal.directory) in pod.journal.log_path("coordinator").read_text(encoding="utf-8")
    shutil.rmtree(pod.journal.directory)
    assert subprocess.run(entrypoint, env=environment, timeout=60, check=False).returncode == TEMPORARY_EXIT_CODE
    assert not pod.journal.directory.exists()
