"""What every back-end does, on a double of the API server; and what is Kubernetes' own."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.backends import kubernetes_api
from launcher.backends.base import BackendUnavailable, Handle, Phase
from launcher.backends.kubernetes import KubernetesBackend
from launcher.backends.kubernetes_api import KubernetesApi
from launcher.backends.kubernetes_api import Place as Namespace
from launcher.backends.kubernetes_manifest import job_name
from launcher.backends.kubernetes_states import status_of, waiting_reason
from launcher.journal import Journal
from launcher.pod import alive_file
from launcher.states import JobState
from parallelism import places
from tests.launcher.conformance import (
    MANY,
    QUICK,
    BackendContract,
    Place,
    make_place,
)
from tests.launcher.kubernetes_double import NAMESPACE, ApiServer, KubeRay, role_of
from tests.object_store import ObjectStore, object_store


@pytest.fixture
def server() -> Iterator[ApiServer]:
    """It grants what the deployment's role does; whatever it was sent has to be right."""
    found = ApiServer(role_of())
    yield found
    found.close()
    assert found.violations == []


@pytest.fixture
def operator(server: ApiServer, tmp_path: Path) -> Iterator[KubeRay]:
    found = KubeRay(server, tmp_path / "operator")
    yield found
    found.close()


@pytest.fixture
def place(server: ApiServer, operator: KubeRay, tmp_path: Path) -> Place:
    return _place(server, tmp_path)


@pytest.fixture
def alone(server: ApiServer, tmp_path: Path) -> Place:
    """Nobody takes RayJobs up: the test says what becomes of them."""
    return _place(server, tmp_path)


def _place(server: ApiServer, folder: Path, journals: str | None = None, **offer: Any) -> Place:
    place = make_place(
        lambda module: KubernetesBackend(module, reason_seconds=0.2),
        folder,
        {"backend": "kubernetes"},
        seconds=120,
        journals=journals,
    )
    home = place.home.root
    home.mkdir(parents=True, exist_ok=True)
    profile = {
        "kubeconfig": str(server.kubeconfig(folder)),
        "namespace": NAMESPACE,
        "image": "espalier:1",
        "python": sys.executable,
        "volumes": [{"claim": "home", "mount": str(folder)}],
        **offer,
    }
    (home / "profiles.yaml").write_text(yaml.safe_dump({"default": {"kubernetes": profile}}), encoding="utf-8")
    return place


def _submitted(place: Place) -> tuple[Journal, KubernetesBackend, Handle]:
    journal, backend = place.journal(MANY), KubernetesBackend(QUICK, reason_seconds=0.0)
    return journal, backend, backend.submit(journal)


def _until(condition: Callable[[], object], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def test_a_submission_s_name_follows_from_the_job_and_is_taken_once(alone: Place, server: ApiServer) -> None:
    journal, first, second = alone.journal(MANY), KubernetesBackend(QUICK), KubernetesBackend(QUICK)
    handle = first.submit(journal)
    assert handle["name"] == job_name(journal.job_id, journal.location, 1)
    assert second.submit(journal) == handle  # 409: somebody was faster
    assert list(server.ray_jobs()) == [handle["name"]]
    assert second.find(journal) == handle


def test_a_name_that_is_somebody_else_s_is_not_taken_over(alone: Place, server: ApiServer) -> None:
    journal, backend = alone.journal(MANY), KubernetesBackend(QUICK)
    handle = backend.submit(journal)
    server.ray_jobs()[handle["name"]]["metadata"]["annotations"]["espalier/journal"] = "/elsewhere"
    with pytest.raises(ValueError, match="already exists"):
        backend.submit(journal)
    assert backend.find(journal) is None


def test_what_is_left_of_earlier_epochs_is_removed(place: Place, server: ApiServer) -> None:
    journal, backend, handle = place.running()
    backend.stop(handle, place.seconds)
    assert [handle["name"]] == list(server.ray_jobs())  # it ended by itself, and tells how
    again = backend.submit(Journal(journal.directory))
    assert again["name"].endswith("-e2")
    place.until(lambda: list(server.ray_jobs()) == [again["name"]])
    backend.stop(again, 0)
    assert server.ray_jobs() == {}


def test_many_jobs_are_followed_by_one_watch(alone: Place, server: ApiServer) -> None:
    backend = KubernetesBackend(QUICK, reason_seconds=60.0)
    handles = [backend.submit(alone.journal(MANY)) for _ in range(10)]
    for one in handles:
        server.change(one["name"], jobDeploymentStatus="Running", jobStatus="RUNNING")
    _until(lambda: all(backend.status(one).phase is Phase.RUNNING for one in handles))
    _until(lambda: server.count("watch", "rayjobs") == 1)
    asked = len(server.requests)
    for _ in range(20):
        assert {backend.status(one).phase for one in handles} == {Phase.RUNNING}
    assert len(server.requests) == asked
    assert server.count("watch", "rayjobs") == 1


def test_a_history_that_is_gone_is_listed_again(alone: Place, server: ApiServer) -> None:
    _, backend, handle = _submitted(alone)
    backend.status(handle)
    _until(lambda: server.count("watch", "rayjobs") == 1)
    lists = server.count("list", "/rayjobs")
    server.compact()
    server.change(handle["name"], jobDeploymentStatus="Running", jobStatus="RUNNING")
    _until(lambda: backend.status(handle).phase is Phase.RUNNING)
    assert server.count("list", "/rayjobs") == lists + 1


def test_a_watch_that_the_server_ends_goes_on_where_it_was(alone: Place, server: ApiServer) -> None:
    _, backend, handle = _submitted(alone)
    backend.status(handle)
    lists = server.count("list", "/rayjobs")
    for _ in range(3):
        watches = server.count("watch", "rayjobs")
        server.end_watches()
        _until(lambda before=watches: server.count("watch", "rayjobs") > before)
    server.change(handle["name"], jobDeploymentStatus="Running", jobStatus="RUNNING")
    _until(lambda: backend.status(handle).phase is Phase.RUNNING)
    assert server.count("list", "/rayjobs") == lists


def test_a_watch_that_says_nothing_begins_again(
    alone: Place, server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes_api, "SILENT_SECONDS", 0.3)
    _, backend, handle = _submitted(alone)
    backend.status(handle)
    lists = server.count("list", "/rayjobs")
    _until(lambda: server.count("watch", "rayjobs") >= 3)
    server.change(handle["name"], jobDeploymentStatus="Running", jobStatus="RUNNING")
    _until(lambda: backend.status(handle).phase is Phase.RUNNING)
    assert server.count("list", "/rayjobs") == lists


def test_a_job_stands_where_it_stood_while_the_server_is_in_trouble(alone: Place, server: ApiServer) -> None:
    _, backend, handle = _submitted(alone)
    server.change(handle["name"], jobDeploymentStatus="Running", jobStatus="RUNNING")
    _until(lambda: backend.status(handle).phase is Phase.RUNNING)
    server.failures += [(503, "etcdserver: leader changed")] * 4
    server.end_watches()
    _until(lambda: "leader changed" in backend.status(handle).reason)
    assert backend.status(handle).phase is Phase.RUNNING
    server.failures.clear()
    server.change(handle["name"], jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    _until(lambda: backend.status(handle).phase is Phase.ENDED)


@pytest.mark.parametrize(
    ("code", "kind", "told"),
    [
        (500, BackendUnavailable, r"is in trouble \(500\): boom"),
        (503, BackendUnavailable, r"is in trouble \(503\): boom"),
        (429, BackendUnavailable, r"is in trouble \(429\): boom"),
        (403, ValueError, r"refused \(403\): boom; the operator puts right"),
        (422, ValueError, r"refused: boom"),
        (404, ValueError, r"does not know that: boom"),
    ],
)
def test_trouble_is_waited_for_and_refusals_are_told(
    alone: Place, server: ApiServer, code: int, kind: type[Exception], told: str
) -> None:
    server.failures.append((code, "boom"))
    with pytest.raises(kind, match=told):
        KubernetesBackend(QUICK).submit(alone.journal(MANY))


def test_a_wrong_token_and_a_role_that_lacks_a_verb_are_told(alone: Place, server: ApiServer, tmp_path: Path) -> None:
    server.granted.discard(("ray.io", "rayjobs", "create"))
    with pytest.raises(ValueError, match=r'403.*User "dispatcher" cannot create resource'):
        KubernetesBackend(QUICK).submit(alone.journal(MANY))
    server.kubeconfig(tmp_path, token="wrong")
    with pytest.raises(ValueError, match=r"\(401\): Unauthorized; the operator puts right kubernetes.kubeconfig"):
        KubernetesBackend(QUICK).submit(alone.journal(MANY))


def test_a_server_that_does_not_answer_is_waited_for(
    alone: Place, server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes_api, "ANSWER_SECONDS", 0.3)
    server.slow_seconds = 1.0
    with pytest.raises(BackendUnavailable, match=r"does not answer: .*timed out"):
        KubernetesBackend(QUICK).submit(alone.journal(MANY))
    server.slow_seconds = 0.0
    _, backend, handle = _submitted(alone)
    server.http.shutdown()
    server.http.server_close()
    fresh = KubernetesBackend(QUICK)
    with pytest.raises(BackendUnavailable, match="does not answer"):
        fresh.submit(alone.journal(MANY))
    status = fresh.status(handle)
    assert status.phase is Phase.WAITING
    assert "does not answer" in status.reason
    assert backend.logs(handle, alone.journal(MANY)) == ""


def test_a_reply_that_was_lost_is_found_by_the_next_try(
    alone: Place, server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server made the RayJob, and the answer did not come back."""
    monkeypatch.setattr(kubernetes_api, "ANSWER_SECONDS", 0.4)
    journal, backend = alone.journal(MANY), KubernetesBackend(QUICK)
    send = kubernetes_api.KubernetesApi.create

    def slow(self: KubernetesApi, manifest: dict[str, Any]) -> dict[str, Any]:
        server.slow_seconds = 0.8
        return send(self, manifest)

    monkeypatch.setattr(kubernetes_api.KubernetesApi, "create", slow)
    with pytest.raises(BackendUnavailable):
        backend.submit(journal)
    server.slow_seconds = 0.0
    monkeypatch.setattr(kubernetes_api.KubernetesApi, "create", send)
    _until(lambda: len(server.ray_jobs()) == 1)
    found = backend.find(journal)
    assert found is not None
    assert backend.submit(journal) == found


def test_without_the_client_the_extra_is_named(alone: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(ValueError, match=r"pip install 'espalier-service\[kubernetes\]'"):
        KubernetesBackend(QUICK).submit(alone.journal(MANY))


def test_a_kubeconfig_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"kubernetes\.kubeconfig .*nowhere"):
        KubernetesApi(Namespace("default", str(tmp_path / "nowhere")))


def test_why_a_job_waits_is_told_in_the_cluster_s_words(alone: Place, server: ApiServer) -> None:
    _, backend, handle = _submitted(alone)
    assert "has not been looked at by KubeRay" in backend.status(handle).reason
    cluster = f"{handle['name']}-abcde"
    server.change(handle["name"], jobDeploymentStatus="Initializing", rayClusterName=cluster)
    labels = {"ray.io/cluster": cluster, "ray.io/node-type": "head"}
    unscheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes: no GPU"}
    pod = {"metadata": {"name": "head", "labels": labels}, "status": {"conditions": [unscheduled]}}
    server.put("", "pods", pod)
    _until(lambda: "pod head is not scheduled: 0/3 nodes: no GPU" in backend.status(handle).reason)
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    pod["status"] = {"conditions": [], "containerStatuses": [{"state": waiting}]}
    quota = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreateHeadPod", "message": "exceeded quota"}
    labels = {"ray.io/originated-from-cr-name": handle["name"]}
    made = {"metadata": {"name": cluster, "labels": labels}, "status": {"conditions": [quota]}}
    server.put("ray.io", "rayclusters", made)
    _until(lambda: "FailedCreateHeadPod: exceeded quota; pod head: ImagePullBackOff" in backend.status(handle).reason)
    server.change(handle["name"], jobDeploymentStatus="Suspended", rayClusterName="")
    waits = {"type": "QuotaReserved", "status": "False", "message": "insufficient unused quota for nvidia.com/gpu"}
    labels = {"kueue.x-k8s.io/job-uid": handle["uid"]}
    workload = {"metadata": {"name": "w", "labels": labels}, "status": {"conditions": [waits]}}
    server.put("kueue.x-k8s.io", "workloads", workload)
    _until(lambda: "is suspended: Kueue: insufficient unused quota" in backend.status(handle).reason)
    assert backend.status(handle).phase is Phase.WAITING


def test_a_job_that_kueue_preempts_writes_checkpoints_and_goes_on_when_it_is_let_in(
    server: ApiServer, operator: KubeRay, tmp_path: Path
) -> None:
    place = _place(server, tmp_path, queue_kind="kueue")
    journal, backend = place.journal(MANY), place.make(QUICK)
    handle = backend.submit(journal)
    place.until(lambda: "is suspended" in backend.status(handle).reason)
    operator.resume(handle["name"])
    place.until(lambda: Journal(journal.directory).view().candidate("small").latest.get("step", 0) >= 3)
    operator.suspend(handle["name"])
    place.until(lambda: backend.status(handle).phase is Phase.WAITING)
    view = Journal(journal.directory).view()
    assert view.state is JobState.INTERRUPTED
    saved = view.candidate("small").latest["step"]
    assert view.candidate("small").gang.checkpoint_step == saved
    operator.resume(handle["name"])
    place.until(lambda: Journal(journal.directory).view().candidate("small").latest["step"] > saved)
    assert (Journal(journal.directory).view().epoch, len(server.ray_jobs())) == (2, 1)
    backend.stop(handle, 0)


def test_a_job_that_somebody_deleted_is_not_started_again(place: Place, server: ApiServer) -> None:
    _, backend, handle = place.running()
    KubernetesApi(Namespace(NAMESPACE, handle["kubeconfig"])).delete(handle["name"], handle["uid"])
    place.until(lambda: backend.status(handle).phase is Phase.ENDED)
    status = backend.status(handle)
    assert (status.final, status.reason) == (True, f"RayJob {handle['name']} was deleted")


def test_only_the_submission_that_was_meant_is_stopped(alone: Place, server: ApiServer) -> None:
    journal, backend, handle = _submitted(alone)
    server.change(handle["name"], "DELETED")
    again = KubernetesBackend(QUICK).submit(journal)
    assert again["name"] == handle["name"]
    backend.stop(handle, 0)
    assert backend.status(handle).phase is Phase.ENDED
    assert list(server.ray_jobs()) == [again["name"]]
    assert backend.status(again).phase is Phase.WAITING


def test_what_the_head_s_pod_printed_is_shown_where_the_coordinator_said_nothing(
    alone: Place, server: ApiServer
) -> None:
    journal, backend, handle = _submitted(alone)
    server.change(handle["name"], jobDeploymentStatus="Initializing", rayClusterName="c")
    labels = {"ray.io/cluster": "c", "ray.io/node-type": "head"}
    server.put("", "pods", {"metadata": {"name": "head", "labels": labels}})
    server.logs["head"] = "bash: ray: command not found\n"
    _until(lambda: "command not found" in backend.logs(handle, journal))
    server.change(handle["name"], jobDeploymentStatus="Failed", jobStatus="FAILED", reason="AppFailed", message=ENDED)
    _until(lambda: backend.logs(handle, journal) == "Trace")


def test_the_role_grants_what_is_used_and_nothing_else(place: Place, server: ApiServer) -> None:
    journal, backend, handle = place.running()
    cluster = server.ray_jobs()[handle["name"]]["status"]["rayClusterName"]
    api = KubernetesApi(Namespace(NAMESPACE, handle["kubeconfig"]))
    labels = {"ray.io/cluster": cluster, "ray.io/node-type": "head"}
    server.put("", "pods", {"metadata": {"name": "head", "labels": labels}})
    assert (api.clusters(handle["name"]), api.workloads(handle["uid"]), api.head_log(cluster, 5)) == ([], [], "")
    place.until(lambda: backend.status(handle).phase is Phase.RUNNING)
    assert backend.find(journal) == handle
    backend.stop(handle, 0)
    assert server.used == server.granted


def _ray_job(deployment: str, job: str = "", **more: Any) -> dict[str, Any]:
    status = {"jobDeploymentStatus": deployment, "jobStatus": job, "rayClusterName": "c", **more}
    return {"metadata": {"name": "x"}, "spec": {}, "status": status}


ENDED = "Job entrypoint command failed with exit code 3, last available logs (truncated to 20,000 chars):\nTrace"


@pytest.mark.parametrize(
    ("row", "expected", "told"),
    [
        ({"metadata": {"name": "x"}, "spec": {}}, (Phase.WAITING, None, False), "has not been looked at by KubeRay"),
        ({"metadata": {"name": "x"}, "spec": {"suspend": True}}, (Phase.WAITING, None, False), "x is suspended"),
        (_ray_job("Initializing"), (Phase.WAITING, None, False), "x is Initializing"),
        (_ray_job("Running", "PENDING"), (Phase.WAITING, None, False), "Ray starts the coordinator"),
        (_ray_job("Running", "RUNNING"), (Phase.RUNNING, None, False), "runs on cluster c"),
        (_ray_job("Suspending", "RUNNING"), (Phase.WAITING, None, False), "x is suspended"),
        (_ray_job("Retrying"), (Phase.WAITING, None, False), "x is Retrying"),
        (_ray_job("Complete", "SUCCEEDED"), (Phase.ENDED, 0, False), "x is Complete (SUCCEEDED)"),
        (_ray_job("Complete", "STOPPED"), (Phase.ENDED, None, True), "x is Complete (STOPPED)"),
        (
            _ray_job("Failed", "FAILED", reason="AppFailed", message=ENDED),
            (Phase.ENDED, 3, False),
            "x is Failed (FAILED) AppFailed: Job entrypoint command failed with exit code 3",
        ),
        (
            _ray_job("Failed", "RUNNING", reason="DeadlineExceeded", message="too long"),
            (Phase.ENDED, None, True),
            "DeadlineExceeded: too long",
        ),
        (_ray_job("ValidationFailed", reason="ValidationFailed", message="no"), (Phase.ENDED, None, True), ": no"),
    ],
)
def test_kuberay_s_states_in_this_project_s_words(row: dict[str, Any], expected: tuple[Any, ...], told: str) -> None:
    status = status_of(row)
    assert (status.phase, status.exit_code, status.final) == expected
    assert told in status.reason
    assert "Trace" not in status.reason


def test_since_when_it_runs_is_ray_s_word() -> None:
    row = _ray_job(
        "Running", "RUNNING", startTime="1970-01-01T00:00:10Z", rayJobInfo={"startTime": "1970-01-01T00:01:00Z"}
    )
    assert status_of(row).since == 60.0


def test_reasons_are_told_once_and_in_few_words() -> None:
    condition = {"type": "PodScheduled", "status": "False", "message": "m" * 400}
    pods = [{"metadata": {"name": str(index)}, "status": {"conditions": [condition]}} for index in range(9)]
    assert len(waiting_reason(pods)) == 500
    assert waiting_reason([{"metadata": {"name": "x"}}]) == ""
    memory = {"lastState": {"terminated": {"reason": "OOMKilled"}}}
    short = [{"metadata": {"name": "x"}, "status": {"containerStatuses": [memory]}}]
    assert waiting_reason(short) == "pod x needed more memory than its limit (OOMKilled)"


class TestKubernetes(BackendContract):
    """On the double."""


class TestKubernetesWithoutSharedFiles(BackendContract):
    """Jobs are in an object store, and no volume of the pods holds the home."""

    @pytest.fixture(scope="class")
    def store(self) -> Iterator[ObjectStore]:
        """A real one."""
        with object_store() as found:
            yield found

    @pytest.fixture
    def place(self, server: ApiServer, store: ObjectStore, operator: KubeRay, tmp_path: Path) -> Place:
        """The operator's pods have what the store asks for."""
        return _place(server, tmp_path, journals=store.url(tmp_path.name), volumes=[])

    def test_a_pod_that_goes_waits_for_checkpoints_and_leaves_no_trace(
        self, place: Place, server: ApiServer, operator: KubeRay
    ) -> None:
        journal, backend, handle = place.running()
        KubernetesApi(Namespace(NAMESPACE, handle["kubeconfig"])).delete(handle["name"], handle["uid"])
        place.until(lambda: backend.status(handle).phase is Phase.ENDED)
        view = Journal(journal.directory).view()
        assert view.state is JobState.INTERRUPTED
        assert view.candidate("small").gang.checkpoint_step == view.candidate("small").latest["step"]
        assert not places.exists(alive_file(Path(handle["stop_file"])))
