"""Fault tests stand on the stack of the lifecycle tests; those that break servers have servers of their own."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import boto3
import httpx2
import psycopg
import pytest
from moto.server import ThreadedMotoServer

from shared.store.db import session_scope
from shared.tenants import keys
from standalone.postgres import EmbeddedPostgres
from standalone.valkey import EmbeddedValkey
from tests.faults.proxy import Proxy
from tests.lifecycle.conftest import servers, stack  # noqa: F401  # fixtures
from tests.lifecycle.stack import Servers, Stack, open_stack, until
from tests.patience import patience
from tests.servers import TEMPLATE, begin_with, open_folder


@contextmanager
def own_servers(folder: Path, cluster: Path) -> Iterator[Servers]:
    """A Postgres that begins with the data of `cluster`, and a Valkey: servers that a test may stop and kill."""
    with ExitStack() as end:
        place = end.enter_context(open_folder())
        begin_with(cluster, place)
        postgres = EmbeddedPostgres(place, log=folder / "postgres.log")
        valkey = EmbeddedValkey(folder / "valkey")
        postgres.start()
        end.callback(postgres.stop)
        valkey.start()
        end.callback(valkey.stop)
        yield Servers(postgres, valkey, TEMPLATE)


@pytest.fixture
def own_stack(migrated_cluster: Path, tmp_path: Path) -> Iterator[Stack]:
    """A stack whose Postgres and Valkey the test may stop and kill."""
    with (
        own_servers(tmp_path, migrated_cluster) as servers_of_mine,
        open_stack(tmp_path / "stack", servers_of_mine) as made,
    ):
        yield made
    assert made.survivors() == [], "a trainer outlived its worker"


@contextmanager
def relay(upstream: Path | tuple[str, int], **options: Any) -> Iterator[Proxy]:
    """A proxy before a server, while a test lasts."""
    proxy = Proxy(upstream, **options)
    try:
        yield proxy
    finally:
        proxy.close()


@contextmanager
def s3_server() -> Iterator[tuple[str, int]]:
    """An S3 server with an empty bucket `artifacts`; yields (host, port)."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        boto3.client(
            "s3",
            endpoint_url=f"http://{host}:{port}",
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        ).create_bucket(Bucket="artifacts")
        yield host, port
    finally:
        server.stop()


def s3_environment(host: str, port: int) -> dict[str, str]:
    """How a process finds that server, or a proxy before it."""
    return {
        "STORAGE_URL": "s3://artifacts/tunepool",
        "TUNEPOOL_STORAGE_ENDPOINT": f"http://{host}:{port}",
        "TUNEPOOL_STORAGE_ACCESS_KEY": "test",
        "TUNEPOOL_STORAGE_SECRET_KEY": "test",
    }


@contextmanager
def api_process(place: Stack, **environment: str) -> Iterator[str]:
    """An API process of its own; yields its base URL."""
    words = ["-m", "api.serve", "--factory", "api.app:app_from_settings", "--host", "127.0.0.1"]
    words += ["--http", "api.bounded_head:BoundedHead"]
    with httpx2.Client(timeout=patience(20)) as probe:
        port = _free_port()
        process = place.start([*words, "--port", str(port)], name="api", **environment)
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            try:
                return probe.get(f"{url}/livez").status_code == 200
            except httpx2.TransportError:
                return False

        try:
            until(answers, what="an API that answers")
            yield url
        finally:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def make_secret(place: Stack) -> str:
    """A key for the stack's project."""
    with session_scope(place.engine) as session:
        return keys.create(session, project_id=place.caller.project_id, name="client", scopes=("*",))[1]


def postgres_admin(server: EmbeddedPostgres, database: str = "postgres") -> psycopg.Connection[tuple[object, ...]]:
    return psycopg.connect(f"host={server.socket_dir} user=postgres dbname={database}", autocommit=True)
