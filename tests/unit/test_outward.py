"""Where requests may go that users named: the public internet, allowed networks, and nothing that looks like them."""

from __future__ import annotations

import http.server
import os
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from shared.errors import Invalid
from shared.tenants import name_look_up, outward, pinned_connection
from shared.tenants.outward import NotAllowed
from tests import living
from tests.certificates import Authority
from tests.patience import patience
from worker.chores import pinned_line

LOOPBACK = outward.networks("127.0.0.0/8")
HIDDEN = [
    *("127.0.0.1", "0.1.2.3", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1"),
    *("255.255.255.255", "192.0.2.1", "240.0.0.1", "::", "::1", "fe80::1", "fd00::1", "ff02::1", "2001:db8::1"),
    # Addresses that hold another one.
    *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "2002:7f00:1::", "64:ff9b::a9fe:a9fe", "64:ff9b::7f00:1"),
    *("fec0::1", "feff::1", "3fff::1", "192.0.0.8", "192.88.99.1"),
]


@pytest.mark.parametrize("address", HIDDEN)
def test_an_address_inside_is_refused_however_it_is_written(address: str) -> None:
    with pytest.raises(NotAllowed):
        outward.refuse(ip_address(address), allowed=())


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"])
def test_the_public_internet_is_allowed_but_not_without_encryption(address: str) -> None:
    outward.refuse(ip_address(address), allowed=())
    with pytest.raises(NotAllowed):
        outward.refuse(ip_address(address), allowed=LOOPBACK, plain=True)


def test_an_allowed_network_is_allowed_and_no_other() -> None:
    outward.refuse(ip_address("127.3.2.1"), allowed=LOOPBACK, plain=True)
    outward.refuse(ip_address("::ffff:127.0.0.1"), allowed=LOOPBACK)
    with pytest.raises(NotAllowed):
        outward.refuse(ip_address("10.0.0.1"), allowed=LOOPBACK)


@pytest.mark.parametrize(
    "url",
    [
        *("http://example.com/", "ftp://example.com/", "https://", "example.com", "https://user:p@example.com/", "//x"),
        *("https://example.com/#part", "https://127.0.0.1/", "https://[::1]/", "https://exämple.com/", "https://a b/"),
        *("https://example.com:99999/", "https://a\\b/", "https://example.com/\r\nX: y", "https://[::1/"),
        "https://" + "a" * 2000,
    ],
)
def test_a_url_that_leads_nowhere_good_is_refused_by_field(url: str) -> None:
    with pytest.raises(Invalid) as refused:
        outward.target(url, allowed=())

    assert refused.value.param == "url"


def test_a_url_is_taken_apart_once() -> None:
    assert outward.target("https://Example.com:8443/a/b?c=d", allowed=()) == outward.Destination(
        "https", "example.com", 8443, "/a/b?c=d"
    )


class _Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.server.heard.append(self.path)  # type: ignore[attr-defined]
        status = int(self.path.strip("/") or 200)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/200")
        self.end_headers()

    def log_message(self, *words: object) -> None: ...


@contextmanager
def receiver(tls: ssl.SSLContext | None = None) -> Iterator[tuple[int, list[str]]]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Receiver)
    server.heard = []  # type: ignore[attr-defined]
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # who does not trust it hangs up
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1], server.heard  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def post(url: str, *, addresses: list[str] | None = None, allowed=LOOPBACK, seconds: float | None = None):
    resolve = name_look_up.addresses if addresses is None else lambda *_: addresses
    return pinned_line.post(
        url, b"{}", {"webhook-id": "evt_1"}, allowed=allowed, seconds=seconds or patience(5), resolve=resolve
    )


def test_only_a_success_is_taken_and_a_redirect_is_not_followed() -> None:
    with receiver() as (port, heard):
        outcomes = [post(f"http://127.0.0.1:{port}/{status}") for status in (200, 204, 302, 410, 500)]

    assert [outcome.status for outcome in outcomes] == [200, 204, 302, 410, 500]
    assert [outcome.taken for outcome in outcomes] == [True, True, False, False, False]
    assert heard == ["/200", "/204", "/302", "/410", "/500"]


def test_a_name_that_leads_inside_is_not_connected_to() -> None:
    with receiver() as (port, heard):
        for host in ("localhost", "127.1", "2130706433"):
            outcome = post(f"https://{host}:{port}/", allowed=())
            assert outcome.status is None
            assert "TUNEPOOL_WEBHOOK_NETWORKS" in (outcome.error or "")

    assert heard == []


def test_one_hidden_address_among_public_ones_refuses_the_name() -> None:
    outcome = post("https://mixed.example/", addresses=["8.8.8.8", "10.0.0.1"], allowed=())

    assert "10.0.0.1" in (outcome.error or "")


def test_a_name_that_changes_between_the_look_and_the_connection_changes_nothing() -> None:
    # A rebinding resolver answers with an allowed address first and a hidden one ever after: it is asked once.
    asked: list[str] = []
    with receiver() as (port, heard), receiver() as (other, hidden):

        def rebinding(host: str, _port: int, _seconds: float) -> list[str]:
            asked.append(host)
            return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

        outcome = pinned_line.post(
            f"http://rebinding.example:{port}/200",
            b"{}",
            {},
            allowed=outward.networks("127.0.0.1/32"),
            seconds=patience(5),
            resolve=rebinding,
        )
        assert other

    assert outcome.taken
    assert (asked, heard, hidden) == (["rebinding.example"], ["/200"], [])


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with receiver() as (port, _):
        assert post(f"http://127.0.0.1:{port}/200").taken


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.0 200 OK\r\n\r\n"])
def test_an_answer_that_comes_byte_by_byte_is_cut_off_in_time(head: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port, over = listener.getsockname()[1], threading.Event()

        listener.settimeout(patience(20))

        def drip() -> None:
            try:
                line, _ = listener.accept()
            except TimeoutError:  # nobody came: the time was up before
                return
            with line:
                line.sendall(head)
                while not over.wait(0.05):
                    try:
                        line.sendall(b"y")
                    except OSError:
                        return

        thread = threading.Thread(target=drip)
        thread.start()
        began = time.monotonic()
        outcome = post(f"http://127.0.0.1:{port}/", seconds=0.5)
        over.set()
        thread.join()

    assert (outcome.status, outcome.error) == (None, "It did not answer in time.")
    assert time.monotonic() - began < patience(5)


def test_what_goes_wrong_is_said_without_details_of_our_network() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # nobody listens, and nobody else can have the port meanwhile
        assert post(f"http://127.0.0.1:{deaf.getsockname()[1]}/").error == "It refused the connection."
    assert post("https://nowhere.invalid/", addresses=[]).error == "Its name has no address."
    with receiver() as (port, heard):
        assert "TLS" in (post(f"https://127.0.0.1:{port}/").error or "")
    assert heard == []


def test_a_resolver_that_hangs_costs_the_time_of_one_request_and_leaves_nothing() -> None:
    began, before = time.monotonic(), set(threading.enumerate())
    hangs = partial(name_look_up.addresses, program=("sh", "-c", "exec sleep 600"))
    for _ in range(3):
        outcome = pinned_line.post("https://hangs.example/", b"{}", {}, allowed=LOOPBACK, seconds=0.3, resolve=hangs)
        assert (outcome.status, outcome.error) == (None, "It did not answer in time.")

    assert time.monotonic() - began < patience(10)
    assert set(threading.enumerate()) <= before
    assert [child for child in living.children(os.getpid()) if living.name(child) == "sleep"] == []


def test_time_that_a_look_up_took_is_not_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    class Noted(pinned_connection._PinnedLine):
        def __init__(self, *words: Any, seconds: float) -> None:
            given.append(seconds)
            super().__init__(*words, seconds=seconds)

    def late(_host: str, _port: int, seconds: float) -> list[str]:
        threading.Event().wait(0.9 * seconds)
        return ["127.0.0.1"]

    monkeypatch.setattr(pinned_connection, "_PinnedLine", Noted)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        outcome = pinned_line.post(
            f"http://late.example:{silent.getsockname()[1]}/", b"{}", {}, allowed=LOOPBACK, seconds=1, resolve=late
        )

    assert outcome.error == "It did not answer in time."
    assert len(given) == 1
    assert 0 < given[0] < 0.2


def test_a_name_is_looked_up_by_a_process_that_knows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEPOOL_SIGNING_SECRET", "not to be told")
    tells = (sys.executable, "-c", "import os; print(os.environ.get('TUNEPOOL_SIGNING_SECRET', 'nothing'))")

    assert name_look_up.addresses("localhost", 443, patience(10))[0] in ("127.0.0.1", "::1")
    assert name_look_up.addresses("x.example", 443, patience(10), program=tells) == ["nothing"]
    assert name_look_up.addresses("2606:4700::1", 443, 0) == ["2606:4700::1"]
    for nobody in ("-h", "nobody.invalid", "a" * 64):
        with pytest.raises(socket.gaierror):
            name_look_up.addresses(nobody, 443, patience(20))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.founded(tmp_path)


def test_an_event_is_delivered_by_tls_to_the_name_and_not_to_the_address(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(authority.certify("hooks.example", tmp_path))
    asked: list[str | None] = []
    tls.sni_callback = lambda _line, name, _context: asked.append(name)
    with receiver(tls) as (port, heard):
        strange = post(f"https://hooks.example:{port}/200", addresses=["127.0.0.1"])
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
        delivered = post(f"https://hooks.example:{port}/200", addresses=["127.0.0.1"])
        other = post(f"https://else.example:{port}/200", addresses=["127.0.0.1"])

    assert (delivered.status, delivered.error, delivered.taken) == (200, None, True)
    assert heard == ["/200"]
    assert asked == ["hooks.example", "hooks.example", "else.example"]
    assert "CERTIFICATE_VERIFY_FAILED" in (strange.error or ""), "nobody vouches for it"
    assert "CERTIFICATE_VERIFY_FAILED" in (other.error or ""), "it is another's certificate"
