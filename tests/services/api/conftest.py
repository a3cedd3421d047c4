"""An API in this process, on an empty home; what a dispatcher would write is written by the tests."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from launcher.journal import Journal
from services.api.app import make_app
from services.api.context import Service
from services.settings import Settings
from services.store.database import Database
from tests.services.running import text_files, tiny_job


class Api:
    """The app, and what stands behind it."""

    def __init__(self, home: Path, **changes: Any) -> None:
        self.settings = Settings(home=home, **changes)
        Database(self.settings.database_url).migrate()
        self.app = make_app(self.settings)
        self.service: Service = self.app.state.service
        self.http = TestClient(self.app, base_url="http://127.0.0.1:8700", raise_server_exceptions=False)
        self.spec = tiny_job(text_files(home / "data"))

    def submit(self, key: str | None = None, **changes: Any) -> str:
        """Hand the small job in; its id."""
        answer = self.http.post("/v1/jobs", json={**self.spec, **changes}, headers=bearer(key))
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def journal(self, job: str) -> Journal:
        """The job's journal, made as the dispatcher makes it, its epoch claimed."""
        from services.dispatcher.watch import make_journal

        journal = make_journal(self.service.home, self.service.jobs.get(job, None, whole=True))
        journal.claim_epoch()
        return journal


def bearer(key: str | None) -> dict[str, str]:
    """The header that shows a key."""
    return {"Authorization": f"Bearer {key}"} if key else {}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    made = Api(tmp_path / "home")
    yield made
    made.service.database.close()
