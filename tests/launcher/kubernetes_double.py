"""An API server in this process that takes only what a real one would: paths, verbs, bodies, versions, and the role.

Whatever it was sent that no client should send stands in ``violations``. :class:`KubeRay` beside it does with RayJobs
what the operator does, running their entrypoints as processes of this machine.
"""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.launcher.kubernetes_schema import crd, kuberay_refuses, unknown_fields, wrong_by_crd

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE, TOKEN = "espalier", "a-token-of-the-tests"
PATH = re.compile(r"/(?:api|apis/(?P<group>[^/]+))/(?P<version>[^/]+)/namespaces/(?P<namespace>[^/]+)/(?P<rest>.+)")
VERSIONS = {"ray.io": ("v1",), "": ("v1",), "kueue.x-k8s.io": ("v1beta1",)}
QUERIES = {
    "create": {"fieldValidation"},
    "get": set(),
    "list": {"labelSelector"},
    "watch": {"labelSelector", "watch", "resourceVersion", "allowWatchBookmarks", "timeoutSeconds"},
    "delete": set(),
    "log": {"container", "tailLines"},
}
Key = tuple[str, str]


@dataclass
class Event:
    """Something that happened to a RayJob."""

    version: int
    kind: str
    document: dict[str, Any]


@dataclass
class ApiServer:
    """State, faults and what was asked of it. ``granted``: (group, resource, verb)."""

    granted: set[tuple[str, str, str]]
    objects: dict[Key, dict[str, dict[str, Any]]] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    used: set[tuple[str, str, str]] = field(default_factory=set)
    failures: list[tuple[int, str]] = field(default_factory=list)
    """Answers to the next requests, instead of what they ask for."""
    slow_seconds: float = 0.0
    watch_seconds: float = 60.0
    on_change: Callable[[str, dict[str, Any]], None] = lambda kind, document: None

    def __post_init__(self) -> None:
        self.lock = threading.Condition()
        self.version, self.compacted = 100, 0
        self.events: list[Event] = []
        self.cut = 0
        self.schema = crd("rayjobs")
        self.http = _Quiet(self)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def kubeconfig(self, folder: Path, token: str = TOKEN) -> Path:
        """A file that leads here."""
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "double",
            "contexts": [{"name": "double", "context": {"cluster": "double", "user": "dispatcher"}}],
            "clusters": [{"name": "double", "cluster": {"server": self.url}}],
            "users": [{"name": "dispatcher", "user": {"token": token}}],
        }
        path = folder / "kubeconfig"
        path.write_text(yaml.safe_dump(document), encoding="utf-8")
        return path

    def put(self, group: str, plural: str, document: dict[str, Any]) -> None:
        """What others make: pods, Ray clusters, workloads."""
        with self.lock:
            self.objects.setdefault((group, plural), {})[document["metadata"]["name"]] = document

    def ray_jobs(self) -> dict[str, dict[str, Any]]:
        return self.objects.setdefault(("ray.io", "rayjobs"), {})

    def change(self, name: str, kind: str = "MODIFIED", **status: Any) -> None:
        """A controller changes a RayJob's status, or (``DELETED``) takes away its last finalizer."""
        with self.lock:
            document = self.ray_jobs()[name]
            document.setdefault("status", {}).update(status)
            self.happened(kind, document)
            if kind == "DELETED":
                del self.ray_jobs()[name]

    def happened(self, kind: str, document: dict[str, Any]) -> None:
        with self.lock:
            self.version += 1
            document["metadata"]["resourceVersion"] = str(self.version)
            self.events.append(Event(self.version, kind, copy.deepcopy(document)))
            self.lock.notify_all()

    def compact(self) -> None:
        """Forget all that happened, as etcd does after minutes, and end the watches."""
        with self.lock:
            self.version += 1
            self.compacted = self.version
            self.events.clear()
            self.cut += 1
            self.lock.notify_all()

    def end_watches(self) -> None:
        with self.lock:
            self.cut += 1
            self.lock.notify_all()

    def count(self, verb: str, part: str) -> int:
        return sum(one == verb and part in path for one, path in self.requests)

    def close(self) -> None:
        self.end_watches()
        self.http.shutdown()
        self.http.server_close()


class _Quiet(ThreadingHTTPServer):
    """Clients that go away in the middle are part of the tests."""

    def __init__(self, api: ApiServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.api = api

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def role_of(path: Path = ROOT / "deploy" / "kubernetes" / "base" / "rbac.yaml") -> set[tuple[str, str, str]]:
    """What the deployment's role grants the dispatcher."""
    documents = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    return {
        (group, resource, verb)
        for document in documents
        if document["kind"] == "Role"
        for rule in document["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


class _Handler(BaseHTTPRequestHandler):
    """One connection: a request is checked, answered from the server's state, and written down."""

    protocol_version = "HTTP/1.1"
    server: "_Quiet"

    @property
    def api(self) -> ApiServer:
        return self.server.api

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def do_PATCH(self) -> None:
        self._answer("PATCH")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            self._serve(method, body)
        except Refused as refused:
            status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "metadata": {}}
            told = {"message": str(refused), "reason": refused.reason, "code": refused.code}
            self._send(refused.code, json.dumps(status | told).encode())

    def _serve(self, method: str, body: bytes) -> None:
        time.sleep(self.api.slow_seconds)
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        with self.api.lock:
            failure = self.api.failures.pop(0) if self.api.failures else None
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refused(401, "Unauthorized", "Unauthorized")
        if failure:
            raise Refused(failure[0], "InternalError", failure[1])
        group, plural, name, sub = self._place(url.path)
        verb = {"POST": "create", "DELETE": "delete"}.get(method, method.lower())
        if verb == "get" and name is None:
            verb = "watch" if query.get("watch") == "true" else "list"
        resource = f"{plural}/{sub}" if sub else plural
        self.api.requests.append((verb, url.path))
        if (group, resource, verb) not in self.api.granted:
            raise Refused(403, "Forbidden", f'{resource} is forbidden: User "dispatcher" cannot {verb} resource')
        self.api.used.add((group, resource, verb))
        self._check_query("log" if sub else verb, query)
        if sub:
            self._send(200, self.api.logs.get(name or "", "").encode(), "text/plain")
        elif verb == "create":
            self._create(body)
        elif verb == "delete":
            self._delete(str(name), body)
        elif verb == "get":
            self._send_document(200, self._known(group, plural, str(name)))
        elif verb == "list":
            self._list(group, plural, query)
        else:
            self._watch(query)

    def _place(self, path: str) -> tuple[str, str, str | None, str | None]:
        found = PATH.fullmatch(path)
        if not found:
            self.api.violations.append(f"no such path: {path}")
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        group = found["group"] or ""
        if found["version"] not in VERSIONS.get(group, ()):
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        if found["namespace"] != NAMESPACE:
            self.api.violations.append(f"another namespace: {path}")
            raise Refused(403, "Forbidden", "not in that namespace")
        plural, _, rest = found["rest"].partition("/")
        name, _, sub = rest.partition("/")
        return group, plural, name or None, sub or None

    def _check_query(self, verb: str, query: dict[str, str]) -> None:
        if set(query) != QUERIES[verb]:
            self.api.violations.append(f"{verb} with {sorted(query)}")
        if verb == "create" and query.get("fieldValidation") != "Strict":
            self.api.violations.append("unknown fields are let pass")

    def _known(self, group: str, plural: str, name: str) -> dict[str, Any]:
        found = self.api.objects.get((group, plural), {}).get(name)
        if found is None:
            raise Refused(404, "NotFound", f'{plural}.{group} "{name}" not found')
        return found

    def _create(self, body: bytes) -> None:
        if self.headers["Content-Type"] != "application/json":
            self.api.violations.append(f"a body of {self.headers['Content-Type']}")
        document = json.loads(body)
        problems = unknown_fields(document) or (self.api.schema and wrong_by_crd(document, self.api.schema))
        if problems or document["kind"] != "RayJob" or document["metadata"]["namespace"] != NAMESPACE:
            self.api.violations.append(f"no RayJob: {problems}")
            raise Refused(400, "BadRequest", f"strict decoding error: {problems}")
        with self.api.lock:
            name = document["metadata"]["name"]
            if name in self.api.ray_jobs():
                raise Refused(409, "AlreadyExists", f'rayjobs.ray.io "{name}" already exists')
            document["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": "2026-11-01T00:00:00Z"}
            self.api.ray_jobs()[name] = document
            self.api.happened("ADDED", document)
            answer = copy.deepcopy(document)
        self._send_document(201, answer)
        self.api.on_change("ADDED", document)

    def _delete(self, name: str, body: bytes) -> None:
        if self.headers["Content-Type"] != "application/json":
            self.api.violations.append(f"a body of {self.headers['Content-Type']}")
        options = json.loads(body)
        if set(options) != {"apiVersion", "kind", "propagationPolicy", "preconditions"}:
            self.api.violations.append(f"deletion with {options}")
        with self.api.lock:
            document = self._known("ray.io", "rayjobs", name)
            if options["preconditions"]["uid"] != document["metadata"]["uid"]:
                raise Refused(409, "Conflict", "the UID in the precondition does not match")
            again = "deletionTimestamp" in document["metadata"]
            document["metadata"]["deletionTimestamp"] = "2026-11-01T00:10:00Z"
            document["metadata"]["finalizers"] = ["foregroundDeletion"]
            self.api.happened("MODIFIED", document)
            answer = copy.deepcopy(document)
        self._send_document(200, answer)
        if not again:
            self.api.on_change("DELETED", document)

    def _list(self, group: str, plural: str, query: dict[str, str]) -> None:
        with self.api.lock:
            found = self.api.objects.get((group, plural), {}).values()
            items = [copy.deepcopy(one) for one in found if _selected(one, query["labelSelector"])]
            metadata = {"resourceVersion": str(self.api.version)}
        self._send_document(200, {"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items})

    def _watch(self, query: dict[str, str]) -> None:
        after, selector, cut = int(query["resourceVersion"]), query["labelSelector"], self.api.cut
        if after > self.api.version or query["allowWatchBookmarks"] != "true":
            self.api.violations.append(f"watch after {after}, which has not been")
        self.send_response(200)
        self.send_header("Content-Type", "application/json;stream=watch")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if after < self.api.compacted:
            gone = {
                "kind": "Status",
                "code": 410,
                "reason": "Expired",
                "message": f"too old resource version: {after}",
            }
            self._event({"type": "ERROR", "object": gone})
            self._chunk(b"")
            return
        deadline = time.monotonic() + min(self.api.watch_seconds, float(query["timeoutSeconds"]))
        while time.monotonic() < deadline and self.api.cut == cut:
            with self.api.lock:
                news = [one for one in self.api.events if one.version > after]
                if not news:
                    self.api.lock.wait(min(0.5, max(0.0, deadline - time.monotonic())))
            for event in news:
                after = event.version
                if _selected(event.document, selector):
                    self._event({"type": event.kind, "object": event.document})
        bookmark = {"kind": "RayJob", "apiVersion": "ray.io/v1", "metadata": {"resourceVersion": str(after)}}
        self._event({"type": "BOOKMARK", "object": bookmark})
        self._chunk(b"")

    def _event(self, event: dict[str, Any]) -> None:
        line = json.dumps(event).encode() + b"\n"
        for part in (line[:7], line[7:]):  # an event may come in pieces
            self._chunk(part)

    def _chunk(self, part: bytes) -> None:
        try:
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _send_document(self, code: int, document: dict[str, Any]) -> None:
        self._send(code, json.dumps(document).encode())

    def _send(self, code: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _selected(document: dict[str, Any], selector: str) -> bool:
    labels = document["metadata"].get("labels", {})
    return all(labels.get(name) == value for name, _, value in (one.partition("=") for one in selector.split(",")))


class KubeRay:
    """Takes up RayJobs as the operator does; their one pod is a process of this machine. ``folder`` holds a ``ray``."""

    def __init__(self, server: ApiServer, folder: Path) -> None:
        self._server = server
        self._pods: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "ray").write_text("#!/bin/sh\n", encoding="utf-8")
        (folder / "bin" / "ray").chmod(0o755)
        self._environment = os.environ | {"PATH": f"{folder}/bin:{os.environ['PATH']}"}
        server.on_change = self._changed

    def _changed(self, kind: str, document: dict[str, Any]) -> None:
        work = self.take_up if kind == "ADDED" else self._delete
        threading.Thread(target=work, args=(document,), daemon=True).start()

    def take_up(self, document: dict[str, Any]) -> None:
        """New, or no longer suspended."""
        name, refused = document["metadata"]["name"], kuberay_refuses(document)
        if refused:
            self._server.violations.append(refused)
            self._server.change(
                name, jobDeploymentStatus="ValidationFailed", reason="ValidationFailed", message=refused
            )
            return
        if document["spec"].get("suspend"):
            self._server.change(name, jobDeploymentStatus="Suspended", jobStatus="")
            return
        cluster = f"{name}-{uuid.uuid4().hex[:5]}"
        self._server.change(name, jobDeploymentStatus="Initializing", jobStatus="", rayClusterName=cluster)
        entrypoint = ["/bin/sh", "-c", document["spec"]["entrypoint"]]
        pod = subprocess.Popen(entrypoint, env=self._environment, start_new_session=True)
        self._pods[name] = pod
        self._server.change(name, jobDeploymentStatus="Running", jobStatus="PENDING", startTime="2026-11-01T00:00:00Z")
        started = {"startTime": "2026-11-01T00:01:00Z"}
        self._server.change(name, jobDeploymentStatus="Running", jobStatus="RUNNING", rayJobInfo=started)
        code = pod.wait()
        if self._pods.get(name) is pod and name in self._server.ray_jobs():
            self._end(name, code)

    def _end(self, name: str, code: int) -> None:
        if code == 0:
            self._server.change(name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
            return
        told = (
            f"Job entrypoint command failed with exit code {code}, last available logs (truncated to 20,000 chars):\n…"
        )
        self._server.change(name, jobDeploymentStatus="Failed", jobStatus="FAILED", reason="AppFailed", message=told)

    def suspend(self, name: str) -> None:
        """Kueue wants the place for somebody else."""
        document = self._server.ray_jobs()[name]
        document["spec"]["suspend"] = True
        self._server.change(name, jobDeploymentStatus="Suspending")
        self._end_pods(document)
        self._server.change(name, jobDeploymentStatus="Suspended", jobStatus="", rayClusterName="")

    def resume(self, name: str) -> None:
        """Kueue lets it in."""
        document = self._server.ray_jobs()[name]
        document["spec"]["suspend"] = False
        threading.Thread(target=self.take_up, args=(document,), daemon=True).start()

    def _delete(self, document: dict[str, Any]) -> None:
        self._end_pods(document)
        self._server.change(document["metadata"]["name"], "DELETED")

    def _end_pods(self, document: dict[str, Any]) -> None:
        pod = self._pods.pop(document["metadata"]["name"], None)
        if pod is None:
            return
        template = document["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        hook = template["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        subprocess.run(hook, env=self._environment, timeout=template["terminationGracePeriodSeconds"], check=True)
        if pod.poll() is None:
            os.killpg(pod.pid, signal.SIGKILL)
        pod.wait()

    def close(self) -> None:
        """End what still runs."""
        for pod in list(self._pods.values()):
            if pod.poll() is None:
                os.killpg(pod.pid, signal.SIGKILL)
                pod.wait()
