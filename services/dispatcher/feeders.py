"""One MLflow feeder for each job that has something to tell; a job at rest keeps it until all is told."""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor

from launcher.jobs import Home
from launcher.tracking.process import EXIT_DONE, EXIT_REFUSED, FeederProcess

AGAIN_SECONDS = 60.0
CLOSE_SECONDS = 60.0

log = logging.getLogger("espalier.dispatcher")


class Feeders:
    """The feeders of this process. They end with it, and whoever leads next starts others where these stopped."""

    def __init__(self, home: Home, uri: str | None) -> None:
        self._home = home
        self._uri = uri
        self._running: dict[str, FeederProcess] = {}
        self._closing: dict[str, Future[int]] = {}
        self._not_before: dict[str, float] = {}
        self._threads = ThreadPoolExecutor(4, "feeder")

    def tend(self, active: set[str], unfed: set[str]) -> set[str]:
        """Start and end feeders: ``active`` jobs are worked on, ``unfed`` ones have something to tell.

        Returns the jobs of which everything has been told since the last call.
        """
        for job_id in sorted(unfed - set(self._running) - set(self._closing)):
            if time.monotonic() >= self._not_before.get(job_id, 0.0):
                self._start(job_id, once=job_id not in active)
        for job_id in [one for one, process in self._running.items() if one not in active or process.ended]:
            self._closing[job_id] = self._threads.submit(self._running.pop(job_id).close, CLOSE_SECONDS)
        return self._harvest(active)

    def _start(self, job_id: str, once: bool) -> None:
        try:
            self._running[job_id] = FeederProcess(self._home.journal(job_id), self._home.root, self._uri, once)
        except OSError as error:
            self._not_before[job_id] = time.monotonic() + AGAIN_SECONDS
            log.warning("the feeder of job %s does not start: %s", job_id, error)

    def _harvest(self, active: set[str]) -> set[str]:
        told = set()
        for job_id in [one for one, future in self._closing.items() if future.done()]:
            exit_code = self._closing.pop(job_id).result()
            # What MLflow refuses of a job at rest, it refuses the next time too.
            if job_id not in active and exit_code in (EXIT_DONE, EXIT_REFUSED):
                told.add(job_id)
            elif exit_code != EXIT_DONE:
                self._not_before[job_id] = time.monotonic() + AGAIN_SECONDS
                log.warning("MLflow does not have all of job %s yet (exit code %s)", job_id, exit_code)
        return told

    def close(self, seconds: float) -> None:
        """End all of them; what is not told then, the next ones tell."""
        for process in self._running.values():
            self._threads.submit(process.close, seconds)
        self._threads.shutdown()
