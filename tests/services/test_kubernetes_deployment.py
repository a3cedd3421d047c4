"""deploy/kubernetes: what is listed exists, parts find each other, rights are the least, settings are read."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from launcher.backends.kubernetes_manifest import MANAGED_BY
from launcher.profiles import KubernetesProfile, load_profiles
from services.cli import app
from services.settings import load_settings
from tests.services.running import ROOT

FOLDER = ROOT / "deploy" / "kubernetes"
BASE = FOLDER / "base"
OVERLAYS = ("object-store", "production", "single-node")
HOME = "/var/lib/espalier"
STORE = "espalier-store"
COMPONENT = "app.kubernetes.io/component"


def documents(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one]


def listed(folder: Path) -> list[dict[str, Any]]:
    (kustomization,) = documents(folder / "kustomization.yaml")
    return [one for name in kustomization["resources"] if name.endswith(".yaml") for one in documents(folder / name)]


BASE_OBJECTS = listed(BASE)


def of_kind(*kinds: str) -> list[dict[str, Any]]:
    return [one for one in BASE_OBJECTS if one["kind"] in kinds]


WORKLOADS = of_kind("Deployment", "StatefulSet")


def named(document: dict[str, Any]) -> str:
    return str(document["metadata"]["name"])


def containers(workload: dict[str, Any]) -> list[dict[str, Any]]:
    spec = workload["spec"]["template"]["spec"]
    return [*spec.get("initContainers", []), *spec["containers"]]


def test_every_file_is_listed_and_every_object_is_there_once() -> None:
    for folder in (BASE, *(FOLDER / "overlays" / name for name in OVERLAYS)):
        (kustomization,) = documents(folder / "kustomization.yaml")
        names = {
            *kustomization["resources"],
            *(one["path"] for one in kustomization.get("patches", []) if "path" in one),
        }
        files = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
        assert files == {name for name in names if "/" not in name}
        assert all((folder / name).exists() for name in names)
    assert len({(one["kind"], named(one)) for one in BASE_OBJECTS}) == len(BASE_OBJECTS)
    assert {named(one) for one in WORKLOADS} == {
        "espalier-api",
        "espalier-dispatcher",
        "espalier-mlflow",
        "espalier-postgres",
    }


def test_selectors_meet_the_pods_they_mean() -> None:
    labels = {named(one): one["spec"]["template"]["metadata"]["labels"] for one in WORKLOADS}
    for workload in WORKLOADS:
        selector = workload["spec"]["selector"]["matchLabels"]
        assert selector.items() <= labels[named(workload)].items()
    for service in of_kind("Service"):
        (workload,) = [one for one in WORKLOADS if named(one) == named(service)]
        assert service["spec"]["selector"].items() <= labels[named(workload)].items()
        ports = {port["name"] for one in containers(workload) for port in one.get("ports", [])}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for budget in of_kind("PodDisruptionBudget"):
        assert budget["spec"]["selector"]["matchLabels"].items() <= labels[named(budget)].items()
    assert {named(one) for one in of_kind("PodDisruptionBudget")} == set(labels) - {"espalier-mlflow"}


def test_what_pods_mount_and_name_is_there() -> None:
    claims = {named(one) for one in of_kind("PersistentVolumeClaim")}
    (settings,) = of_kind("ConfigMap")
    for workload in WORKLOADS:
        spec = workload["spec"]["template"]["spec"]
        own = {one["metadata"]["name"] for one in workload["spec"].get("volumeClaimTemplates", [])}
        volumes = {one["name"]: one for one in spec["volumes"]}
        for container in containers(workload):
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes) | own
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
            if "configMap" in volume:
                assert volume["configMap"]["name"] == named(settings)
                keys = {one["key"] for one in volume["configMap"].get("items", [])}
                assert keys <= set(settings["data"])
            if "secret" in volume:
                assert volume["secret"]["secretName"] in {"espalier-postgres", "espalier-admin"}
    assert not of_kind("Secret")  # they are made by hand, and named


def test_no_pod_may_do_more_than_it_has_to() -> None:
    accounts = {named(one) for one in of_kind("ServiceAccount")}
    for workload in WORKLOADS:
        spec = workload["spec"]["template"]["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(workload):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
            assert "memory" in container["resources"]["limits"]
        asks = named(workload) == "espalier-dispatcher"
        assert spec["automountServiceAccountToken"] is asks
        assert (spec.get("serviceAccountName") in accounts) is asks
        if not asks:
            assert all("readinessProbe" in one and "livenessProbe" in one for one in spec["containers"])
    for role in of_kind("Role"):
        assert all("*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"] for rule in role["rules"])
    assert not of_kind("ClusterRole", "ClusterRoleBinding")
    (binding,) = of_kind("RoleBinding")
    assert {binding["subjects"][0]["name"], binding["roleRef"]["name"]} == {"espalier-dispatcher"}


def test_nothing_goes_over_the_network_but_what_the_parts_need() -> None:
    policies = {named(one): one["spec"] for one in of_kind("NetworkPolicy")}
    everything = policies["espalier-nothing-else"]
    assert set(everything) == {"podSelector", "policyTypes"}
    covered = everything["podSelector"]["matchLabels"].items()
    assert all(covered <= one["spec"]["template"]["metadata"]["labels"].items() for one in WORKLOADS)
    (allowed,) = policies["espalier-postgres"]["ingress"][0]["from"]
    clients = set(allowed["podSelector"]["matchExpressions"][0]["values"])
    to_store = {
        name.removeprefix("espalier-")
        for name, one in policies.items()
        for rule in one.get("egress", [])
        for peer in rule.get("to", [])
        if peer.get("podSelector", {}).get("matchLabels", {}).get(COMPONENT) == "postgres"
    }
    assert to_store == clients
    jobs = policies["espalier-jobs"]["podSelector"]["matchLabels"]
    assert jobs.items() <= MANAGED_BY.items()


SETTINGS = [BASE, FOLDER / "overlays" / "production", FOLDER / "overlays" / "object-store"]


@pytest.mark.parametrize("path", [folder / "settings.yaml" for folder in SETTINGS], ids=str)
def test_the_settings_are_read_as_they_stand(path: Path, tmp_path: Path) -> None:
    (settings,) = documents(path)
    for name in ("service.yaml", "profiles.yaml"):
        (tmp_path / name).write_text(settings["data"][name], encoding="utf-8")
    service, profile = load_settings(tmp_path), load_profiles(tmp_path)["default"].kubernetes
    assert isinstance(profile, KubernetesProfile)
    assert service.mlflow == "http://espalier-mlflow:5000"
    assert service.backends == ["kubernetes"]  # nothing runs in the pods of the service
    assert service.database_url == "postgresql://espalier@espalier-postgres/espalier"
    assert (profile.run_as_user, profile.fs_group, profile.namespace) == (10001, 10001, "espalier")
    if service.journals:
        assert (profile.volumes, service.roots) == ([], None)
        assert {(one.secret, one.key) for one in profile.secret_environment.values()} == {
            (STORE, variable) for variable in profile.secret_environment
        }
        return
    assert [(one.claim, one.mount) for one in profile.volumes] == [("espalier-home", HOME)]
    assert service.roots is not None
    assert all(root.is_relative_to(HOME) for root in service.roots)


def test_the_commands_of_the_pods_are_commands() -> None:
    for name, words in (("espalier-api", "args"), ("espalier-dispatcher", "command")):
        (workload,) = [one for one in WORKLOADS if named(one) == name]
        (container,) = workload["spec"]["template"]["spec"]["containers"]
        given = [word for word in container[words] if word != "espalier"]
        assert CliRunner().invoke(app, [*given, "--help"]).exit_code == 0


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_puts_the_overlay_together(overlay: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    folder = FOLDER / "overlays" / overlay
    ended = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=120, check=True)
    made = [one for one in yaml.safe_load_all(ended.stdout) if one]
    missing = {(one["kind"], named(one)) for one in BASE_OBJECTS} - {(one["kind"], named(one)) for one in made}
    assert missing == ({("PersistentVolumeClaim", "espalier-home")} if overlay == "object-store" else set())
    assert {one["metadata"].get("namespace") for one in made if one["kind"] != "Namespace"} == {"espalier"}
    (space,) = [one for one in made if one["kind"] == "Namespace"]
    assert space["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}
    for workload in [one for one in made if named(one) in ("espalier-api", "espalier-dispatcher")]:
        if workload["kind"] == "Deployment":
            (home,) = [one for one in workload["spec"]["template"]["spec"]["volumes"] if one["name"] == "home"]
            (container,) = workload["spec"]["template"]["spec"]["containers"]
            in_store = overlay == "object-store"
            assert ("emptyDir" in home, "persistentVolumeClaim" in home) == (in_store, not in_store)
            assert container.get("envFrom") == ([{"secretRef": {"name": STORE}}] if in_store else None)
