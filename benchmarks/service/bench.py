"""The API over 100,000 jobs: latencies at an open load, the rate at which it saturates, its memory.

Requests come at their times whether earlier ones have been answered or not, half of them reads of one job, the others
lists by state and by name; every latency counts from the moment the request was due. The memory is read while the API
answers 100 requests/s for minutes; growth is the slope of a line through the second half of the readings.

    python benchmarks/service/bench.py [--jobs 100000] [--seconds 15] [--minutes 4] [--database URL] [--memory-only]
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
SUSTAINED_RATE, SAMPLE_SECONDS = 100, 1.0


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


class Memory(threading.Thread):
    """Reads a process's resident set while another one keeps it busy."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.ending = threading.Event()
        self.readings: list[tuple[float, float]] = []
        """Seconds since the first, and megabytes."""
        self._process = psutil.Process(pid)

    def run(self) -> None:
        """Until told to stop."""
        started = time.monotonic()
        while not self.ending.wait(SAMPLE_SECONDS):
            self.readings.append((time.monotonic() - started, self._process.memory_info().rss / 1e6))

    def summary(self) -> dict[str, Any]:
        """What the second half of the readings says, and every twentieth part of all."""
        later = self.readings[len(self.readings) // 2 :]
        slope = statistics.linear_regression(*zip(*later, strict=True)).slope
        every = max(1, len(self.readings) // 20)
        return {
            "megabytes": [round(megabytes, 1) for _, megabytes in self.readings[::every]],
            "growth_megabytes_per_minute": round(60 * slope, 3),
            "spread_megabytes": round(max(value for _, value in later) - min(value for _, value in later), 1),
        }


@contextmanager
def serving(database_url: str, folder: Path, jobs: int) -> Iterator[tuple[str, int]]:
    """An API over so many jobs: its address and its process."""
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
        yield url, server.pid
    finally:
        server.terminate()
        server.wait()


def measure_loads(url: str, jobs: int, seconds: float) -> dict[str, Any]:
    """Latencies at growing rates."""
    rows = [asyncio.run(load(url, rate, seconds, jobs)) for rate in (50, 100, 150, 200, 250)]
    good = [row["rate"] for row in rows if row["p99"] < LIMIT_SECONDS and not row["errors"]]
    return {
        "loads": rows,
        "highest_rate_below_50_ms": max(good, default=None),
        "load_average_at_end": os.getloadavg()[0],
    }


def measure_memory(url: str, pid: int, jobs: int, minutes: float) -> dict[str, Any]:
    """Memory under a load that goes on."""
    memory = Memory(pid)
    memory.start()
    row = asyncio.run(load(url, SUSTAINED_RATE, 60 * minutes, jobs))
    memory.ending.set()
    memory.join()
    return {"minutes": minutes, **row, **memory.summary()}


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
    parser.add_argument("--minutes", type=float, default=4.0, help="of the load under which memory is read")
    parser.add_argument("--database", help="an empty PostgreSQL database; default: SQLite in a temporary folder")
    parser.add_argument("--memory-only", action="store_true", help="keep the latencies that were measured before")
    given = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory(prefix="espalier-bench-") as name:
        store = given.database or f"sqlite:///{name}/jobs.db"
        found = {**kept.get(store.partition(":")[0], {}), "store": store.partition(":")[0], "jobs": given.jobs}
        with serving(store, Path(name), given.jobs) as (url, pid):
            if not given.memory_only:
                found |= measure_loads(url, given.jobs, given.seconds)
            found["memory"] = measure_memory(url, pid, given.jobs, given.minutes)
    kept[found["store"]] = found
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
