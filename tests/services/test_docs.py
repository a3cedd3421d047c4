"""Every command in the README and the docs is one that exists, and those that end quickly are run as they stand."""

import ast
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from launcher.spec import load_spec
from services.cli import app
from services.client import Client
from services.settings import load_settings
from tests.finished import RUN_SECONDS, FinishedJob, espalier
from tests.services.conftest import Done
from tests.services.running import ROOT

pytestmark = pytest.mark.timeout(2 * RUN_SECONDS)  # the first test that asks for the finished job waits for it

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICK = {"plan", "presets", "frontier", "list", "show", "gc", "track", "render"}
"""Commands that end within seconds; the others (run, demo, ui, pause, cancel) are only parsed."""


@dataclass(frozen=True)
class Line:
    """One documented command."""

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def documented() -> list[Line]:
    """Every line that starts with ``espalier`` in a fenced block of shell commands."""
    lines = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            lines += [Line(page.name, line) for line in block.splitlines() if line.startswith("espalier")]
    return lines


LINES = documented()


def test_there_are_documented_commands_for_everything_a_user_does() -> None:
    assert set(get_command(app).commands) == {line.words[1] for line in LINES}


@pytest.mark.parametrize("line", LINES, ids=str)
def test_documented_command_parses(line: Line) -> None:
    program, name, *arguments = line.words
    assert program == "espalier"
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    command.make_context(name, arguments, resilient_parsing=False)


def is_quick(line: Line) -> bool:
    """The dry run of billions of parameters takes a minute; tests/parallelism does it."""
    large = {"examples/large-models.yaml", "--dry-run"}
    return line.words[1] in QUICK and not large <= set(line.words)


@pytest.mark.parametrize("line", [line for line in LINES if is_quick(line)], ids=str)
def test_documented_command_runs(line: Line, finished: FinishedJob, tmp_path: Path) -> None:
    words = [str(tmp_path / word) if word.endswith((".png", ".html")) else word for word in line.words[1:]]
    home = ["--home", finished.home] if words[0] != "presets" else []
    ended = espalier(*words, *home)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout or ended.stderr


def test_shortest_job_file_of_the_docs_is_valid(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "job-file.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "job.yaml").write_text(block, encoding="utf-8")
        load_spec(tmp_path / "job.yaml")


def test_documented_settings_are_accepted(tmp_path: Path) -> None:
    found = [
        block
        for page in PAGES
        for block in re.findall(r"```yaml service\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    ]
    assert found
    for block in found:
        (tmp_path / "service.yaml").write_text(block, encoding="utf-8")
        kept = yaml.safe_load(block)
        assert load_settings(tmp_path).model_dump(mode="json", include=set(kept)) == kept


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_example_can_be_planned(path: Path, tmp_path: Path) -> None:
    elsewhere = ["--on", "h100:32"] if path.name in ("large-models.yaml", "slurm.yaml", "kubernetes.yaml") else []
    ended = espalier("plan", path, "--json", "--home", tmp_path, *elsewhere)
    assert ended.returncode == 0, ended.stderr
    spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert all(candidate["name"] in ended.stdout for candidate in spec["candidates"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


SERVICE_PAGE = ROOT / "docs" / "use-the-service.md"
ADDRESS = "http://127.0.0.1:8700"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", SERVICE_PAGE.read_text(encoding="utf-8"), re.DOTALL)


CURLS = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("curl")]


@pytest.mark.parametrize("line", CURLS)
def test_documented_request_is_answered(line: str, done: Done, tmp_path: Path) -> None:
    """Those that read are sent as they stand; those that change something meet a job that is over, and are refused."""
    words = shlex.split(line.replace(ADDRESS, done.service.url).replace("/JOB", f"/{done.job}"))
    words = [f"@{ROOT / word[1:]}" if word.startswith("@") else word for word in words]
    if "--data-binary" in words:
        words[-1] = words[-1].replace("/v1/jobs", "/v1/plan")
    ended = subprocess.run([*words, "-w", "\n%{http_code}"], capture_output=True, timeout=60, cwd=tmp_path, check=True)
    status = ended.stdout.decode(errors="replace").rpartition("\n")[2]
    assert status == ("409" if "POST" in words else "200"), ended.stdout[-500:]


def test_documented_python_uses_what_the_client_has() -> None:
    for block in blocks("python"):
        used = {
            node.attr
            for node in ast.walk(ast.parse(block))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "client"
        }
        assert used
        assert used <= set(dir(Client))
