"""The back-end through slurmrestd: all that it promises, refusals and tokens, on a real daemon."""

import getpass
from pathlib import Path

import pytest

from launcher.backends.base import BackendUnavailable
from launcher.backends.slurm import SlurmBackend
from launcher.backends.slurm_queue import SlurmRefused
from launcher.backends.slurm_rest import RestQueue
from launcher.profiles import SlurmRest
from tests.launcher.conformance import NO_MODULE, BackendContract, Place, make_place
from tests.slurm.cluster import RealSlurm
from tests.slurm.jobs import SLURM


@pytest.fixture
def rest(slurm: RealSlurm, tmp_path: Path) -> SlurmRest:
    """The daemon, and a token of this user."""
    url, token = slurm.serve_rest(), tmp_path / "token"
    token.write_text(slurm.token(getpass.getuser()), encoding="ascii")
    return SlurmRest(url=url, user=getpass.getuser(), token_file=token)


@pytest.fixture
def place(rest: SlurmRest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Two nodes for each job; none of Slurm's commands is found where jobs are submitted."""
    found = make_place(lambda module: SlurmBackend(module, fresh_seconds=0.2), tmp_path, SLURM, seconds=180)
    found.home.root.mkdir(parents=True)
    profile = f"default: {{slurm: {{rest: {{url: '{rest.url}', user: {rest.user}, token_file: {rest.token_file}}}}}}}\n"
    (found.home.root / "profiles.yaml").write_text(profile, encoding="utf-8")
    monkeypatch.setattr("launcher.backends.slurm_queue._call", _no_commands)
    return found


def _no_commands(*_: object) -> str:
    raise AssertionError("a command of Slurm was called")


class TestSlurmRest(BackendContract):
    """On two real nodes, through a real slurmrestd."""


def test_a_refusal_is_told_in_slurm_s_words(place: Place) -> None:
    wrong = Place(place.make, place.home, {**place.execution, "slurm": SLURM["slurm"] | {"partition": "nowhere"}}, 60)
    with pytest.raises(SlurmRefused, match=r"(?i)partition"):
        place.make(NO_MODULE).submit(wrong.journal(1))


def test_a_token_that_is_not_one_is_told_with_what_to_do(rest: SlurmRest, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("not.a.token", encoding="ascii")
    with pytest.raises(BackendUnavailable, match=r"if the token in .* has ended, renew it there"):
        RestQueue(rest.model_copy(update={"token_file": wrong})).jobs()


def test_a_daemon_that_is_away_is_waited_for(rest: SlurmRest) -> None:
    with pytest.raises(BackendUnavailable, match="does not answer"):
        RestQueue(rest.model_copy(update={"url": "http://127.0.0.1:9"})).jobs()
