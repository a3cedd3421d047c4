"""docker-compose.yml and its neighbours: as the specification has it, complete, and closed to the outside."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from launcher.profiles import load_profiles
from services.settings import load_settings
from services.store.keys import TOKEN
from tests.services.running import ROOT

FOLDER = ROOT / "deploy" / "compose"
SCHEMA = ROOT.parent / "shared" / "schemas" / "compose-spec.json"
FILES = ("docker-compose.yml", "docker-compose.gpu.yml")


def read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    return document


COMPOSE = read("docker-compose.yml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


@pytest.mark.parametrize("name", FILES)
def test_the_file_is_as_the_specification_has_it(name: str) -> None:
    if not SCHEMA.exists():
        pytest.skip("the schema of the compose specification is not beside the repository")
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.validate(read(name), schema)
    broken = {"services": {"api": {**read(name)["services"].popitem()[1], "restarts": "always"}}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)


def test_every_secret_is_made_and_every_one_made_is_used(tmp_path: Path) -> None:
    subprocess.run([sys.executable, FOLDER / "make_secrets.py", tmp_path / "secrets"], check=True)
    made = {path.name for path in (tmp_path / "secrets").iterdir()}
    used = {name for service in SERVICES.values() for name in service.get("secrets", [])}
    assert made == used == set(COMPOSE["secrets"])
    for name, secret in COMPOSE["secrets"].items():
        assert secret == {"file": f"./deploy/compose/secrets/{name}"}
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    texts = {name: (tmp_path / "secrets" / name).read_text().strip() for name in made}
    assert TOKEN.fullmatch(texts["admin-key"])
    assert texts["pgpass"].endswith(f":espalier:{texts['postgres-password']}")
    key = texts["object-store-root"].rpartition("=")[2]
    assert texts["object-store-credentials"].endswith(key)


def test_secrets_that_are_there_stay(tmp_path: Path) -> None:
    command = [sys.executable, FOLDER / "make_secrets.py", tmp_path]
    subprocess.run(command, check=True)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    (tmp_path / "pgpass").unlink()
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "pgpass" in again.stdout
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
    everything = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "everything was there" in everything.stdout


def test_only_this_machine_reaches_it_and_containers_may_do_little() -> None:
    for name, service in SERVICES.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["restart"] == "unless-stopped", name
        assert "privileged" not in service, name
        if name != "postgres":
            assert service["cap_drop"] == ["ALL"], name


def test_images_are_pinned_and_what_is_ours_is_built() -> None:
    built = {service["image"] for service in SERVICES.values() if "build" in service}
    for service in SERVICES.values():
        image, _, tag = service["image"].partition(":")
        assert tag not in ("", "latest")
        assert service["image"] in built or not image.startswith("espalier")
    for service in [one for one in SERVICES.values() if "build" in one]:
        assert (ROOT / service["build"]["dockerfile"]).exists()


def test_parts_wait_for_parts_that_tell_their_health() -> None:
    for service in SERVICES.values():
        for other, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            assert "healthcheck" in SERVICES[other]


def test_its_settings_and_profile_are_read_and_name_its_services(tmp_path: Path) -> None:
    for name in ("service.yaml", "profiles.yaml"):
        (tmp_path / name).write_text((FOLDER / name).read_text(encoding="utf-8"), encoding="utf-8")
    settings = load_settings(tmp_path)
    assert settings.backends == ["ray"]
    profile = load_profiles(tmp_path)["default"].ray
    assert profile is not None
    for address in (settings.database_url, str(settings.mlflow), profile.address):
        assert address.split("//")[1].split("@")[-1].split("/")[0].split(":")[0] in SERVICES
    assert f"--num-cpus {profile.cpus_per_node}" in SERVICES["ray-worker"]["command"]
