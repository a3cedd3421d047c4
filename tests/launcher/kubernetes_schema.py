"""Whether a RayJob is one: by KubeRay's schemas where they lie beside the project, and by the project's own list."""

import gzip
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

SCHEMAS = Path(__file__).resolve().parents[3] / "shared" / "schemas"
LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LONGEST_NAME = 47

TEMPLATE = {
    "metadata": {"labels": {"*": str}},
    "spec": {
        "automountServiceAccountToken": bool,
        "securityContext": {
            "runAsNonRoot": bool,
            "runAsUser": int,
            "fsGroup": int,
            "fsGroupChangePolicy": str,
            "seccompProfile": {"type": str},
        },
        "terminationGracePeriodSeconds": int,
        "serviceAccountName": str,
        "priorityClassName": str,
        "imagePullSecrets": [{"name": str}],
        "nodeSelector": {"*": str},
        "tolerations": [{"key": str, "operator": str, "value": str, "effect": str}],
        "containers": [
            {
                "name": str,
                "image": str,
                "env": [{"name": str, "value": str, "valueFrom": {"secretKeyRef": {"name": str, "key": str}}}],
                "resources": {"requests": {"*": str}, "limits": {"*": str}},
                "securityContext": {"allowPrivilegeEscalation": bool, "capabilities": {"drop": [str]}},
                "lifecycle": {"preStop": {"exec": {"command": [str]}}},
                "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
            }
        ],
        "volumes": [
            {
                "name": str,
                "emptyDir": {"medium": str, "sizeLimit": str},
                "persistentVolumeClaim": {"claimName": str, "readOnly": bool},
                "secret": {"secretName": str, "defaultMode": int},
                "ephemeral": {
                    "volumeClaimTemplate": {
                        "spec": {
                            "accessModes": [str],
                            "storageClassName": str,
                            "resources": {"requests": {"storage": str}},
                        }
                    }
                },
            }
        ],
    },
}
GROUP = {"rayStartParams": {"*": str}, "template": TEMPLATE}
SHAPE = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "namespace": str, "labels": {"*": str}, "annotations": {"*": str}},
    "spec": {
        "submissionMode": str,
        "entrypoint": str,
        "backoffLimit": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "activeDeadlineSeconds": int,
        "suspend": bool,
        "rayClusterSpec": {
            "rayVersion": str,
            "authOptions": {"mode": str},
            "headGroupSpec": {"serviceType": str, **GROUP},
            "workerGroupSpecs": [{"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int, **GROUP}],
        },
    },
}
"""What this project writes, with the types that the API server reads; ``*`` stands for any name."""


def unknown_fields(document: Any, shape: Any = SHAPE, where: str = "") -> list[str]:
    """Paths that are not in the list, or hold another type."""
    if isinstance(shape, dict):
        if not isinstance(document, dict):
            return [where]
        found = []
        for name, value in document.items():
            inner = shape.get(name, shape.get("*"))
            found += [f"{where}.{name}"] if inner is None else unknown_fields(value, inner, f"{where}.{name}")
        return found
    if isinstance(shape, list):
        if not isinstance(document, list):
            return [where]
        return [
            path for index, one in enumerate(document) for path in unknown_fields(one, shape[0], f"{where}.{index}")
        ]
    return [] if type(document) is shape else [where]


def kuberay_refuses(document: dict[str, Any]) -> str | None:
    """What KubeRay 1.7 checks beyond the schema, as far as it concerns what this project writes."""
    name, spec = document["metadata"]["name"], document["spec"]
    if len(name) > LONGEST_NAME or not LABEL.fullmatch(name):
        return f"RayJob name {name} should be a DNS label of no more than {LONGEST_NAME} characters"
    if spec.get("suspend") and not spec["shutdownAfterJobFinishes"]:
        return "a RayJob with shutdownAfterJobFinishes set to false is not allowed to be suspended"
    cluster = spec["rayClusterSpec"]
    if cluster["authOptions"]["mode"] == "token" and not re.match(r"2\.(5[2-9]|[6-9]\d)", cluster["rayVersion"]):
        return "authOptions.mode is 'token' but RayVersion is not 2.52.0 or later"
    return None


@lru_cache
def crd(plural: str) -> dict[str, Any] | None:
    """The schema of a resource's ``v1``, with unknown fields refused; None where the schemas are not there."""
    path = SCHEMAS / f"kuberay-v1.7-{plural}.crd.yaml.gz"
    if not path.exists():
        return None
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with gzip.open(path, "rb") as file:
        document = yaml.load(file, Loader=loader)
    (schema,) = [one["schema"]["openAPIV3Schema"] for one in document["spec"]["versions"] if one["name"] == "v1"]
    schema["properties"]["metadata"] = {"type": "object"}
    return _strict(schema)


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: _strict(value) for name, value in schema.items()}
    keeps = schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and not keeps and "additionalProperties" not in schema:
        strict["additionalProperties"] = False
    return strict


def wrong_by_crd(document: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    """What a schema has against a document."""
    known = jsonschema.Draft202012Validator(schema)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in known.iter_errors(document)]
