"""The API over 100,000 jobs: latencies at an open load, the rate at which it saturates, its memory.

Requests come at their times whether earlier ones have been answered or not, half of them reads of one job, the others
lists by state and by name; every latency counts from the moment the request was due.

    python benchmarks/service/bench.py [--jobs 100000] [--seconds 15] [--database URL]
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import httpx2
import psutil
from sqlalchemy import text

from launcher.states import JobState
from services.settings import Settings
from services.store.database import Database
from services.store.tables import JobRow
from services.ui import choose_port

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "service.json"
STATES = [JobState.SUCCEEDED] * 90 + [JobState.FAILED] * 6 + [JobState.CANCELLED] * 3 + [JobState.PAUSED]
LIMIT_SECONDS = 0.050


def fill(database: Database, jobs: int) -> None:
    """So many finished jobs, each with a picture of the usual size."""
    candidate = {
        "name": "small",
        "status": "trained",
        "fraction": 1.0,
        "step": 1000,
        "loss": 2.0,
        "validation_loss": 2.1,
        "tokens_per_second": 1e4,
        "seconds_left": None,
        "restarts": 0,
        "error": None,
        "budget": dict.fromkeys(("limit", "spent", "left", "device_seconds", "lost_device_seconds"), 1.0)
        | {"unit": "flops"},
    }
    picture = {"stage": None, "seconds_left": None, "candidates": [candidate] * 3}
    picture |= {"variants": {"measured": 12, "expected": 12}}
    spec = {"name": "x", "text": "x" * 1500}
    for start in range(0, jobs, 5000):
        with database.write() as session:
            session.add_all(
                JobRow(
                    id=f"job-{number:07d}",
                    owner="local",
                    name=f"name-{number % 1000}",
                    spec=spec,
                    plan=spec,
                    request_hash="x",
                    created=float(number),
                    changed=float(number),
                    desired_at=float(number),
                    state=STATES[number % 100].value,
                    progress=1.0,
                    observed=picture,
                )
                for number in range(start, min(jobs, start + 5000))
            )


def paths(jobs: int, count: int) -> list[str]:
    """What is asked for."""
    choose = random.Random(1)
    kinds = (
        lambda: f"/v1/jobs/job-{choose.randrange(jobs):07d}",
        lambda: f"/v1/jobs/job-{choose.randrange(jobs):07d}",
        lambda: f"/v1/jobs?state={choose.choice(['failed', 'paused', 'succeeded'])}&limit=20",
        lambda: f"/v1/jobs?name=name-{choose.randrange(1000)}&limit=20",
    )
    return [kinds[number % 4]() for number in range(count)]


async def load(url: str, rate: float, seconds: float, jobs: int) -> dict[str, float]:
    """Latencies at a rate of requests per second."""
    latencies: list[float] = []
    errors = 0

    async def one(client: httpx2.AsyncClient, path: str, due: float) -> None:
        nonlocal errors
        answer = await client.get(path)
        errors += answer.status_code != 200
        latencies.append(time.perf_counter() - due)

    limits = httpx2.Limits(max_connections=64)
    async with httpx2.AsyncClient(base_url=url, timeout=60, limits=limits) as client, asyncio.TaskGroup() as tasks:
        start = time.perf_counter()
        for number, path in enumerate(paths(jobs, int(rate * seconds))):
            due = start + number / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.create_task(one(client, path, due))
    latencies.sort()
    quantile = {f"p{part}": latencies[min(len(latencies) - 1, len(latencies) * part // 100)] for part in (50, 95, 99)}
    return {"rate": rate, "requests": len(latencies), "errors": errors, **{k: round(v, 5) for k, v in quantile.items()}}


def measure(database_url: str, folder: Path, jobs: int, seconds: float) -> dict[str, object]:
    """One store."""
    database = Database(database_url)
    database.migrate()
    fill(database, jobs)
    with database.write() as session:
        session.execute(text("ANALYZE"))  # what a store that has grown slowly knows of itself
    database.close()
    settings = Settings(home=folder, port=choose_port(0), database=database_url)
    url = f"http://127.0.0.1:{settings.port}"
    server = subprocess.Popen([sys.executable, "-m", "services.api", str(settings.write())], cwd=ROOT)
    try:
        _wait(url)
        asyncio.run(load(url, 50, 3, jobs))  # warm
        before = psutil.Process(server.pid).memory_info().rss
        rows = [asyncio.run(load(url, rate, seconds, jobs)) for rate in (50, 100, 150, 200, 250)]
        after = psutil.Process(server.pid).memory_info().rss
    finally:
        server.terminate()
        server.wait()
    good = [row["rate"] for row in rows if row["p99"] < LIMIT_SECONDS and not row["errors"]]
    return {
        "store": database_url.partition(":")[0],
        "jobs": jobs,
        "loads": rows,
        "highest_rate_below_50_ms": max(good, default=None),
        "memory_mb": [round(before / 1e6), round(after / 1e6)],
        "load_average_at_end": os.getloadavg()[0],
    }


def _wait(url: str) -> None:
    for _ in range(300):
        try:
            if httpx2.get(f"{url}/healthz").status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.1)
    raise TimeoutError("the API did not start")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--database", help="an empty PostgreSQL database; default: SQLite in a temporary folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="espalier-bench-") as name:
        url = given.database or f"sqlite:///{name}/jobs.db"
        found = measure(url, Path(name), given.jobs, given.seconds)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept[str(found["store"])] = found
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
