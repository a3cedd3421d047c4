"""A real S3 server on this machine, whose objects are on a disk: it can be killed and started again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from tests.ports import lasting_ports

KEY, SECRET, BUCKET = "espalier-tests", "not-a-secret-at-all", "jobs"
UP_SECONDS = 60.0


@dataclass
class ObjectStore:
    """One that is up, or has been killed."""

    folder: Path
    ports: list[int]
    host: str = "127.0.0.1"
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def endpoint(self) -> str:
        """Where it answers."""
        return f"http://{self.host}:{self.ports[0]}"

    @property
    def environment(self) -> dict[str, str]:
        """What its clients need, in the words of their own libraries."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def url(self, prefix: str) -> str:
        """An address in it."""
        return f"s3://{BUCKET}/{prefix}"

    def start(self) -> None:
        """Bring it up with the objects it had."""
        s3, master, volume, filer, *inner = self.ports
        command = [str(Path(sys.executable).with_name("weed")), "-logtostderr=true", "server"]
        command += [f"-dir={self.folder}/data", f"-ip={self.host}", f"-ip.bind={self.host}"]
        command += [f"-master.port={master}", f"-master.port.grpc={inner[0]}", "-master.volumeSizeLimitMB=256"]
        command += ["-master.telemetry=false"]
        command += [f"-volume.port={volume}", f"-volume.port.grpc={inner[1]}", "-volume.max=40"]
        command += ["-filer", f"-filer.port={filer}", f"-filer.port.grpc={inner[2]}"]
        command += ["-s3", f"-s3.port={s3}", f"-s3.port.grpc={inner[3]}", f"-s3.config={self.folder}/s3.json"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # at the same ports for everybody otherwise
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._await_up()

    def _await_up(self) -> None:
        deadline = time.monotonic() + UP_SECONDS
        while not self._takes_a_bucket():
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError((self.folder / "log").read_text(errors="replace")[-2000:])
            time.sleep(0.2)

    def _takes_a_bucket(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.endpoint}/status", timeout=2):
                pass
        except urllib.error.HTTPError:
            pass
        except OSError:
            return False
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
            config=Config(retries={"max_attempts": 1}),
        )
        try:
            client.create_bucket(Bucket=BUCKET)
        except (client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
            pass
        except (BotoCoreError, ClientError):
            return False
        try:
            client.put_object(Bucket=BUCKET, Key=".up", Body=b"1")
        except (BotoCoreError, ClientError):
            return False
        return True

    def kill(self) -> None:
        """End it as a power failure does."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None


@contextmanager
def clients_of(store: ObjectStore) -> Iterator[None]:
    """New clients of this process, and of its children, ask this store inside the block, whether it is up or not."""
    with mock.patch.dict(os.environ, store.environment):
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # it does not look at the environment again
        yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@contextmanager
def object_store(host: str = "127.0.0.1") -> Iterator[ObjectStore]:
    """Up inside the block, for clients in this process and its children. ``host``: an address of this machine."""
    folder = Path(tempfile.mkdtemp(prefix="esp-s3-", dir="/tmp"))
    (folder / "data").mkdir()
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}), encoding="utf-8")
    store = ObjectStore(folder, lasting_ports(8), host)
    try:
        store.start()
        with clients_of(store):
            yield store
    finally:
        if store.process is not None and store.process.poll() is None:
            store.kill()
        for port in store.ports:
            for socket in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                socket.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


class _Forgetful(MemoryFileSystem):
    protocol = "forgetful"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: object) -> None:
        super().pipe_file(path, value, mode="overwrite")


def forgetful_store() -> str:
    """The address of a store, in this process alone, that ignores conditions on PUT as some servers do."""
    fsspec.register_implementation("forgetful", _Forgetful, clobber=True)
    return "forgetful://jobs"
