"""A Docker engine of the tests' own, and stand-ins for the images that our files begin with. Needs root (Debian).

No registry of images is asked: stand-ins are made of Debian's packages, carry the names that the files ask for, and do
what the files use of the originals, so that the files are tested as users get them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.services.running import ROOT

UP_SECONDS = 60.0
DEBIAN = "http://deb.debian.org/debian"
PYTHON_IMAGE = "python:3.11-slim-bookworm"
AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"
FOLDER = "ESPALIER_TEST_ENGINE"
"""Names a folder to keep the engine's images in, for people who run these tests more than once."""

POSTGRES = """
FROM {python}
RUN apt-get update && apt-get install -y --no-install-recommends postgresql && rm -rf /var/lib/apt/lists/*
COPY start /usr/local/bin/start
ENV PATH=/usr/lib/postgresql/15/bin:$PATH PGDATA=/var/lib/postgresql/data LANG=C.UTF-8
ENTRYPOINT ["sh", "/usr/local/bin/start"]
"""
POSTGRES_START = """
set -e
if [ ! -e $PGDATA/PG_VERSION ]; then
    chown postgres $PGDATA
    runuser -u postgres -- initdb --username $POSTGRES_USER --auth scram-sha-256 --pwfile $POSTGRES_PASSWORD_FILE
    echo 'host all all all scram-sha-256' >> $PGDATA/pg_hba.conf
    export PGPASSWORD=$(cat $POSTGRES_PASSWORD_FILE)
    runuser -u postgres -- pg_ctl --wait start -o "-c listen_addresses= -c unix_socket_directories=/tmp"
    echo "CREATE DATABASE $POSTGRES_DB" | psql --host /tmp --username $POSTGRES_USER postgres
    cat /docker-entrypoint-initdb.d/* | psql --host /tmp --username $POSTGRES_USER $POSTGRES_DB
    runuser -u postgres -- pg_ctl --wait stop
fi
exec runuser -u postgres -- postgres -c listen_addresses='*' -c unix_socket_directories=/tmp
"""
OBJECT_STORE = """
FROM {python}
RUN apt-get update && apt-get install -y --no-install-recommends nodejs netcat-openbsd && rm -rf /var/lib/apt/lists/*
COPY node_modules /opt/node_modules
COPY versitygw /usr/local/bin/versitygw
RUN chmod +x /usr/local/bin/versitygw
"""
OBJECT_STORE_START = """#!/usr/bin/env node
// versitygw --port :PORT posix FOLDER, by s3rver, with the keys that versitygw is given.
const [, , , port, , directory] = process.argv;
const S3rver = require("/opt/node_modules/s3rver");
const models = require("/opt/node_modules/s3rver/lib/models/account.js");
new models(1, "root").createKeyPair(process.env.ROOT_ACCESS_KEY, process.env.ROOT_SECRET_KEY);
new S3rver({ address: "0.0.0.0", port: Number(port.slice(1)), directory, vhostBuckets: false, silent: true }).run();
"""


@dataclass(frozen=True)
class Engine:
    """One that is up."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """For its clients; without BuildKit, which Debian's client lacks."""
        return {**os.environ, "DOCKER_HOST": f"unix://{self.folder}/socket", "DOCKER_BUILDKIT": "0"}

    def docker(self, *arguments: str, cwd: Path | None = None, seconds: float = 1800.0) -> str:
        """Run a command of the client; its output. Raises :class:`CommandFailed`."""
        return call(["docker", *arguments], self.environment, cwd, seconds)

    def has(self, image: str) -> bool:
        """Whether there is such an image."""
        return bool(self.docker("images", "--quiet", image).strip())

    def size_bytes(self, image: str) -> int:
        """What an image takes, its base included."""
        (document,) = json.loads(self.docker("image", "inspect", image))
        return int(document["Size"])

    def build(self, image: str, dockerfile: str, files: Mapping[str, str] = {}, trees: Mapping[str, Path] = {}) -> None:
        """An image of a text and what it copies."""
        with tempfile.TemporaryDirectory() as name:
            context = Path(name)
            (context / "Dockerfile").write_text(dockerfile, encoding="utf-8")
            for path, text in files.items():
                (context / path).write_text(text.lstrip(), encoding="utf-8")
            for path, tree in trees.items():
                shutil.copytree(tree, context / path, symlinks=True)
            self.docker("build", "--network", "host", "--tag", image, str(context))


class CommandFailed(AssertionError):
    """With the end of what it said."""


def call(command: list[str], environment: Mapping[str, str], cwd: Path | None, seconds: float) -> str:
    """A command's output. Raises :class:`CommandFailed`."""
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        said = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        raise CommandFailed(f"{' '.join(command[:6])} ended with {done.returncode}: {said}")
    return done.stdout


@contextmanager
def real_engine() -> Iterator[Engine]:
    """Up inside the block, with a stand-in for Python's image; nothing is left afterwards, but for images that were to
    stay.
    """
    kept = os.environ.get(FOLDER)
    folder = Path(kept) if kept else Path(tempfile.mkdtemp(prefix="dkr-", dir="/tmp"))
    folder.mkdir(exist_ok=True)
    command = ["dockerd", "--data-root", str(folder / "data"), "--exec-root", str(folder / "exec")]
    command += ["--pidfile", str(folder / "pid"), "--host", f"unix://{folder}/socket", "--log-level", "warn"]
    command += ["--bridge", "none"]  # the compose file makes a network of its own
    with open(folder / "log", "ab") as log:
        daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    engine = Engine(folder)
    try:
        _await_up(engine, daemon)
        if not engine.has(PYTHON_IMAGE):
            _make_python(engine)
        yield engine
    finally:
        daemon.terminate()
        daemon.wait(60)
        _unmount(folder)
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


def _unmount(folder: Path) -> None:
    """What an engine leaves mounted when it ends."""
    targets = [line.split()[1] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    for target in sorted((one for one in targets if one.startswith(f"{folder}/")), reverse=True):
        call(["umount", target], os.environ, None, 60)


def _await_up(engine: Engine, daemon: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + UP_SECONDS
    while True:
        try:
            engine.docker("info")
            return
        except CommandFailed:
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise CommandFailed((engine.folder / "log").read_text()[-3000:]) from None
            time.sleep(0.3)


def make_stand_ins(engine: Engine) -> None:
    """Those of the images that docker-compose.yml names and that the engine does not have."""
    compose = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    postgres, store = (_named(compose, name) for name in ("postgres", "versity/versitygw"))
    if not engine.has(postgres):
        engine.build(postgres, POSTGRES.format(python=PYTHON_IMAGE), {"start": POSTGRES_START})
    if not engine.has(store):
        with tempfile.TemporaryDirectory() as name:
            call(["npm", "install", "--silent", "s3rver@3.7.1"], os.environ, Path(name), 300)
            engine.build(
                store,
                OBJECT_STORE.format(python=PYTHON_IMAGE),
                {"versitygw": OBJECT_STORE_START},
                {"node_modules": Path(name) / "node_modules"},
            )


def _named(compose: str, name: str) -> str:
    found = re.search(rf"image: ({name}:\S+)", compose)
    assert found, f"docker-compose.yml names no {name}"
    return found[1]


def _make_python(engine: Engine) -> None:
    """Debian's own Python, which is 3.11 there; pip finds this machine's torch and trusts what this machine trusts."""
    torch = re.search(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert torch
    with tempfile.TemporaryDirectory(dir=engine.folder) as name:
        root = Path(name) / "root"
        packages = "--include=python3,python3-venv,ca-certificates"
        call(["debootstrap", "--variant=minbase", packages, "bookworm", str(root), DEBIAN], os.environ, None, 900)
        shutil.copy(AUTHORITIES, root / AUTHORITIES.lstrip("/"))
        wheels = root / "opt" / "wheels"
        wheels.mkdir(parents=True)
        options = ["--quiet", "--no-deps", "--python-version", "3.11", "--only-binary", ":all:", "--dest", str(wheels)]
        call([sys.executable, "-m", "pip", "download", *options, torch[0]], os.environ, None, 900)
        (root / "etc" / "pip.conf").write_text(
            f"[global]\nfind-links = /opt/wheels\ncert = {AUTHORITIES}\ndefault-timeout = 180\n", encoding="ascii"
        )
        (root / "usr" / "bin" / "python").symlink_to("python3")
        archive = Path(name) / "root.tar"
        call(["tar", "-C", str(root), "-cf", str(archive), "."], os.environ, None, 300)
        engine.docker(
            "import", "--change", "ENV PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", str(archive), PYTHON_IMAGE
        )
