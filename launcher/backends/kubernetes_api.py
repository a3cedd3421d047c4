"""The part of a cluster's API that jobs need, as plain documents. Torch-free; the client is imported when it is used.

The verbs used here are those that ``deploy/kubernetes/base/rbac.yaml`` grants, and no others.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.backends.base import BackendUnavailable, Handle
from launcher.profiles import KubernetesProfile

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

GROUP, VERSION, RAY_JOBS, RAY_CLUSTERS = "ray.io", "v1", "rayjobs", "rayclusters"
KUEUE, KUEUE_VERSIONS, WORKLOADS = "kueue.x-k8s.io", ("v1beta2", "v1beta1"), "workloads"
CLUSTER_LABEL, ORIGIN_LABEL = "ray.io/cluster", "ray.io/originated-from-cr-name"
NODE_TYPE_LABEL, JOB_UID_LABEL = "ray.io/node-type", "kueue.x-k8s.io/job-uid"

CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 30.0
WATCH_SECONDS = 240
"""After which the server ends a watch, and another begins where it stopped."""
SILENT_SECONDS = 60.0
"""A connection that says nothing for so long may be dead: the watch begins again, which costs nothing."""
IN_CLUSTER = "KUBERNETES_SERVICE_HOST"
MISSING = "the back-end kubernetes needs its client: pip install 'espalier-service[kubernetes]'"

JSON = {"Content-Type": "application/json"}
"""Said aloud: the client leaves it out for custom objects."""

Document = dict[str, Any]


class Gone(Exception):
    """The version that was asked for is too old: the list has to be read again."""


class Taken(ValueError):
    """An object of that name exists, or is another one than was meant."""


@dataclass(frozen=True)
class Place:
    """Where a job's objects are, and who asks for them."""

    namespace: str
    kubeconfig: str | None = None
    context: str | None = None

    @classmethod
    def of_profile(cls, profile: KubernetesProfile) -> "Place":
        """The operator's."""
        return cls(profile.namespace, str(profile.kubeconfig) if profile.kubeconfig else None, profile.context)

    @classmethod
    def of_handle(cls, handle: Handle) -> "Place":
        """As it was when the job was submitted."""
        return cls(handle["namespace"], handle["kubeconfig"], handle["context"])


class KubernetesApi:
    """One namespace. Calls raise ``BackendUnavailable`` where the API server does not answer, ``ValueError`` with its
    words where it refuses."""

    def __init__(self, place: Place) -> None:
        """Raises ``ValueError`` where the client is not installed or its configuration cannot be read."""
        from_cluster = place.kubeconfig is None and place.context is None and bool(os.environ.get(IN_CLUSTER))
        try:
            from kubernetes import client
            from kubernetes.config import ConfigException
        except ImportError as error:
            raise ValueError(MISSING) from error
        self._namespace = place.namespace
        try:
            self._client = _client(place, from_cluster)
        except (ConfigException, OSError) as error:
            raise ValueError(f"kubernetes.kubeconfig {place.kubeconfig or 'of this user'}: {error}") from error
        self._where = f"the Kubernetes API at {self._client.configuration.host}"
        self._objects, self._core = client.CustomObjectsApi(self._client), client.CoreV1Api(self._client)

    def create(self, manifest: Document) -> Document:
        """Make a RayJob; unknown fields are refused. Raises :class:`Taken` where there is one of that name."""
        return self._of_ray(
            self._objects.create_namespaced_custom_object,
            body=manifest,
            field_validation="Strict",
            plural=RAY_JOBS,
            _headers=dict(JSON),
        )

    def get(self, name: str) -> Document | None:
        """One RayJob, or None where there is none."""
        try:
            return self._of_ray(self._objects.get_namespaced_custom_object, name=name, plural=RAY_JOBS)
        except _NotFoundError:
            return None

    def ray_jobs(self, selector: str) -> tuple[list[Document], str]:
        """RayJobs by their labels, and the version of the list, from which a watch goes on."""
        found = self._of_ray(self._objects.list_namespaced_custom_object, label_selector=selector, plural=RAY_JOBS)
        return found["items"], str(found["metadata"]["resourceVersion"])

    def watch(self, selector: str, version: str) -> Iterator[Document]:
        """Events ``{"type", "object"}`` after a version, until the server ends the watch or says nothing.

        Raises :class:`Gone` where the version is too old.
        """
        response = self._send(
            self._objects.list_namespaced_custom_object,
            group=GROUP,
            version=VERSION,
            plural=RAY_JOBS,
            namespace=self._namespace,
            label_selector=selector,
            watch=True,
            resource_version=version,
            allow_watch_bookmarks=True,
            timeout_seconds=WATCH_SECONDS,
            _request_timeout=(CONNECT_SECONDS, SILENT_SECONDS),
        )
        try:
            yield from self._events(response)
        finally:
            response.close()

    def delete(self, name: str, uid: str) -> None:
        """Remove a RayJob with all that it has; it is there until nothing of it is left. Gone already is fine."""
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Foreground",
            "preconditions": {"uid": uid},
        }
        try:
            call = self._objects.delete_namespaced_custom_object
            self._of_ray(call, name=name, body=body, plural=RAY_JOBS, _headers=dict(JSON))
        except (_NotFoundError, Taken):
            return  # it is gone, and perhaps another one has its name

    def pods(self, cluster: str) -> list[Document]:
        """The pods of a Ray cluster."""
        selector = f"{CLUSTER_LABEL}={cluster}"
        return list(self._items(self._core.list_namespaced_pod, label_selector=selector))

    def clusters(self, ray_job: str) -> list[Document]:
        """The Ray clusters that KubeRay made for a RayJob."""
        selector = f"{ORIGIN_LABEL}={ray_job}"
        call = self._objects.list_namespaced_custom_object
        return list(self._items(call, group=GROUP, version=VERSION, plural=RAY_CLUSTERS, label_selector=selector))

    def workloads(self, uid: str) -> list[Document]:
        """What Kueue has of a RayJob; nothing where there is no Kueue."""
        call, selector = self._objects.list_namespaced_custom_object, f"{JOB_UID_LABEL}={uid}"
        for version in KUEUE_VERSIONS:
            try:
                return list(self._items(call, group=KUEUE, version=version, plural=WORKLOADS, label_selector=selector))
            except _NotFoundError:
                continue
        return []

    def head_log(self, cluster: str, lines: int) -> str:
        """The end of what the head's pod printed; empty where there is none."""
        heads = [pod for pod in self.pods(cluster) if pod["metadata"]["labels"].get(NODE_TYPE_LABEL) == "head"]
        if not heads:
            return ""
        name, container = heads[0]["metadata"]["name"], "ray-head"
        try:
            answer = self._send(
                self._core.read_namespaced_pod_log,
                name=name,
                namespace=self._namespace,
                container=container,
                tail_lines=lines,
            )
        except _NotFoundError:
            return ""
        return bytes(answer.data).decode("utf-8", errors="replace")

    def _of_ray(self, call: Callable[..., Any], **arguments: Any) -> Document:
        answer = self._send(call, group=GROUP, version=VERSION, namespace=self._namespace, **arguments)
        found: Document = json.loads(answer.data)
        return found

    def _items(self, call: Callable[..., Any], **arguments: Any) -> Iterator[Document]:
        yield from json.loads(self._send(call, namespace=self._namespace, **arguments).data)["items"]

    def _send(self, call: Callable[..., Any], **arguments: Any) -> Any:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        arguments.setdefault("_request_timeout", (CONNECT_SECONDS, ANSWER_SECONDS))
        try:
            answer = call(**arguments, _preload_content=False)
            if answer.status < HTTPStatus.BAD_REQUEST:
                if not arguments.get("watch"):
                    assert answer.data is not None  # reads it, inside of this block
                return answer
            status, body = answer.status, answer.data
        except HTTPError as error:
            raise BackendUnavailable(f"{self._where} does not answer: {error}") from error
        except ApiException as error:
            if not error.status:  # what TLS has against it
                raise BackendUnavailable(f"{self._where} does not answer: {error.reason}") from error
            status, body = int(error.status), error.body or error.data or ""
        raise self._refusal(status, _message(body))

    def _refusal(self, status: int, told: str) -> Exception:
        if status == HTTPStatus.GONE:
            return Gone(told)
        if status == HTTPStatus.NOT_FOUND:
            return _NotFoundError(f"{self._where} does not know that: {told}")
        if status == HTTPStatus.CONFLICT:
            return Taken(f"{self._where} refused: {told}")
        if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.REQUEST_TIMEOUT) or status >= 500:
            return BackendUnavailable(f"{self._where} is in trouble ({status}): {told}")
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            how = "the operator puts right kubernetes.kubeconfig, the service account or its role"
            return ValueError(f"{self._where} refused ({status}): {told}; {how}")
        return ValueError(f"{self._where} refused: {told}")

    def _events(self, response: Any) -> Iterator[Document]:
        from urllib3.exceptions import HTTPError, ReadTimeoutError

        try:
            for line in _lines(response.stream(decode_content=True)):
                event: Document = json.loads(line)
                if event["type"] == "ERROR":
                    code = int(event["object"].get("code", HTTPStatus.INTERNAL_SERVER_ERROR))
                    raise self._refusal(code, str(event["object"].get("message", "")))
                yield event
        except ReadTimeoutError:
            return
        except HTTPError as error:
            raise BackendUnavailable(f"{self._where} ended a watch: {error}") from error


class _NotFoundError(ValueError):
    """No such object, or no such kind of objects."""


def _client(place: Place, from_cluster: bool) -> "ApiClient":
    from kubernetes import client, config

    configuration = client.Configuration()
    configuration.retries = False  # whoever calls tries again
    if from_cluster:
        config.load_incluster_config(client_configuration=configuration)
    else:
        path = Path(place.kubeconfig).expanduser() if place.kubeconfig else None
        config.load_kube_config(
            config_file=str(path) if path else None, context=place.context, client_configuration=configuration
        )
    return client.ApiClient(configuration)


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    left = b""
    for chunk in chunks:
        *whole, left = (left + chunk).split(b"\n")
        yield from (line for line in whole if line.strip())


def _message(body: bytes | str) -> str:
    """What a ``Status`` says, or whatever else was answered, in one line."""
    text = (body.decode("utf-8", errors="replace") if isinstance(body, bytes) else str(body)).strip()
    try:
        document = json.loads(text)
    except json.JSONDecodeError:
        return text[:300]
    return str(document.get("message") or text[:300]) if isinstance(document, Mapping) else text[:300]
