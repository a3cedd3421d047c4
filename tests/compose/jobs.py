"""Jobs for the service of docker-compose.yml, and what they bring."""

import hashlib
import json
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from services.client import Client
from tests.compose.project import MLFLOW, Project

JOB_SECONDS = 900.0
"""Three times what the longest takes here: enough for a group that hangs, is ended and replaced."""
BATCH, LENGTH = 8, 64
TEXT = "s3://texts/numbers.txt"

UPLOAD = """
import boto3
lines = (f"{'even' if n % 2 == 0 else 'odd'} number {n} has the square {n * n},\\n" for n in range(8000))
boto3.client("s3").put_object(Bucket="texts", Key="numbers.txt", Body="".join(lines).encode())
"""


def upload_text(project: Project) -> None:
    """Put :data:`TEXT` into the object store, from a container that has its keys."""
    project.inside("ray-worker", "python", "-c", UPLOAD)


def job(name: str, steps: int) -> dict[str, Any]:
    """A small model, at tensor 2 over the worker's two CPUs, and one variant; its text is in the object store."""
    candidate = {
        "name": "small",
        "model": {"family": "gpt", "layers": 2, "hidden": 32, "heads": 2},
        "layout": {"tensor": 2},
        "training": {"global_batch": BATCH, "micro_batch": 4, "learning_rate": 0.001},
    }
    return {
        "name": name,
        "seed": 3,
        "data": {"train": [TEXT], "tokenizer": {"kind": "bytes"}, "sequence_length": LENGTH},
        "budget": {"tokens": steps * BATCH * LENGTH},
        "candidates": [candidate],
        "compression": {"prune": {"methods": ["magnitude"], "sparsity": [0.5]}},
        "evaluation": {"tokens": 1024},
        "execution": {"checkpoint_every": {"steps": 10}, "stall_seconds": 100},
    }


def await_success(project: Project, job_id: str) -> None:
    """Wait until a job is at rest, which has to be a success."""
    client = project.client()
    project.until(lambda: not client.job(job_id).active, JOB_SECONDS, lambda: told(client, job_id))
    assert client.job(job_id).state == "succeeded", f"{told(client, job_id)}\n{project.logs()}"


def told(client: Client, job_id: str) -> str:
    """What a job says of itself: where it stands, its last events, and the end of every log."""
    events = [str(event)[:300] for event in client.events(job_id)]
    ends = [f"{log.name}:\n{client.log(job_id, log.name, lines=40)}" for log in client.logs(job_id)]
    return "\n".join([client.job(job_id).model_dump_json(exclude={"spec", "plan", "links"}), *events[-12:], *ends])


def outcome(client: Client, job_id: str) -> dict[str, Any]:
    """What has to be the same for the same job: losses, metrics, and SHA-256 of every variant's tensors."""
    result = client.result(job_id)
    found: dict[str, Any] = {
        row["name"]: [row[key] for key in ("steps", "tokens", "train_loss", "validation_loss")]
        for row in result["candidates"]
    }
    for row in result["variants"]:
        found[f"{row['name']}: metrics"] = row["metrics"]
        with tempfile.TemporaryDirectory() as folder:
            for path in client.download(job_id, row["name"], Path(folder)):
                if path.suffix == ".safetensors":
                    found[f"{row['name']}: {path.name}"] = _tensors_checksum(path.read_bytes())
    return found


def _tensors_checksum(content: bytes) -> str:
    """Of names, shapes and bytes; the header's free text also tells of which job they are, and is left out."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header.pop("__metadata__", None)
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode() + content[end:]).hexdigest()


def mlflow_runs(job_id: str) -> list[dict[str, Any]]:
    """The runs that MLflow shows of a job."""
    found: list[dict[str, Any]] = _mlflow(
        "runs/search", {"experiment_ids": ["1"], "filter": f"tags.`espalier.job` = '{job_id}'"}
    ).get("runs", [])
    return found


def mlflow_steps(job_id: str) -> list[int]:
    """The steps of which MLflow has the candidate's loss, in order; one that was told twice is there twice."""
    (run,) = [run for run in mlflow_runs(job_id) if run["info"]["run_name"] == "small"]
    query = f"metrics/get-history?run_id={run['info']['run_id']}&metric_key=train_loss&max_results=25000"
    return sorted(point["step"] for point in _mlflow(query)["metrics"])


def _mlflow(path: str, document: dict[str, Any] | None = None) -> dict[str, Any]:
    body = json.dumps(document).encode() if document else None
    request = urllib.request.Request(
        f"{MLFLOW}/api/2.0/mlflow/{path}", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        found: dict[str, Any] = json.load(answer)
    return found
