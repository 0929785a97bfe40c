"""A server costs a row at most, whatever it does: bounded time and memory, and the right reason."""

import io
import socket
import ssl
import time
import tracemalloc
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pipeline.fetch import http
from pipeline.fetch.http import HttpFetcher
from pipeline.fetch.settings import FetchSettings
from schemas.errors import RowError
from tests import http_server
from tests.http_server import redirect, serve

ALLOWED = ("127.0.0.1",)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(http, "FIRST_WAIT_S", 0.01)


@pytest.fixture
def site():
    with serve({"/a.jpg": b"picture"}) as found:
        yield found


def fetch(url: str, max_bytes: int = 10**6, seconds: float = 5.0, allow=ALLOWED, rate=1e4) -> bytes:
    into = io.BytesIO()
    HttpFetcher(FetchSettings(allow, seconds, 4, rate), max_bytes).fetch(url, into)
    return into.getvalue()


def refused(url: str, **options) -> RowError:
    with pytest.raises(RowError) as caught:
        fetch(url, **options)
    return caught.value


def test_a_file_comes_as_it_is_and_the_server_knows_who_asks(site):
    assert fetch(site.url("/a.jpg")) == b"picture"
    (headers,) = site.headers
    assert headers["user-agent"].startswith("vl01-batch/")
    assert headers["host"] == f"127.0.0.1:{site.port}"
    assert "authorization" not in headers


def test_a_password_goes_to_its_own_server_only(site):
    site.answers["/moved"] = redirect(site.url("/a.jpg", "localhost"))
    address = f"http://me:se%20cret@127.0.0.1:{site.port}/moved"
    assert fetch(address, allow=("127.0.0.0/8", "localhost")) == b"picture"
    assert [h.get("authorization") for h in site.headers] == ["Basic bWU6c2UgY3JldA==", None]


def test_odd_characters_in_an_address_do_no_harm(site):
    site.files["/%C3%BC%20b.jpg?q=%0D%0AX:%201"] = b"odd"
    assert fetch(site.url("/ü b.jpg?q=\r\nX: 1")) == b"odd"


@pytest.mark.parametrize("status", [404, 410])
def test_a_file_that_is_not_there_is_not_asked_for_again(site, status):
    site.answers["/gone"] = lambda handler: handler.answer(status)
    error = refused(site.url("/gone"))
    assert error.reason == "not_found"
    assert str(status) in error.message
    assert site.times("/gone") == 1


@pytest.mark.parametrize("status", [204, 206, 304, 400, 401, 403, 451, 501])
def test_another_status_is_told_and_not_tried_again(site, status):
    site.answers["/no"] = lambda handler: handler.answer(status)
    error = refused(site.url("/no"))
    assert error.reason == "http_error"
    assert str(status) in error.message
    assert site.times("/no") == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(site, status):
    site.answers["/busy"] = http_server.fail_then(http.ATTEMPTS - 1, status, b"at last")
    assert fetch(site.url("/busy")) == b"at last"
    assert site.times("/busy") == http.ATTEMPTS


def test_a_server_that_stays_busy_is_left_alone_after_some_tries(site):
    site.answers["/busy"] = http_server.fail_then(99, 503, b"")
    error = refused(site.url("/busy"))
    assert error.reason == "http_error"
    assert "503" in error.message
    assert "4 tries" in error.message
    assert site.times("/busy") == http.ATTEMPTS


def test_a_server_decides_when_it_is_asked_again(site):
    site.answers["/busy"] = http_server.fail_then(1, 429, b"at last", Retry_After="1")
    assert fetch(site.url("/busy")) == b"at last"
    first, second = (at for _, at in site.asked)
    assert second - first >= 1


@pytest.mark.parametrize("after", ["3600", "Fri, 01 Jan 2100 00:00:00 GMT", "9" * 400])
def test_a_server_that_asks_for_more_time_than_there_is_is_not_waited_for(site, after):
    site.answers["/busy"] = http_server.fail_then(9, 429, b"at last", Retry_After=after)
    began = time.monotonic()
    into = io.BytesIO()
    fetcher = HttpFetcher(FetchSettings(ALLOWED, 3.0), 1000)
    fetcher._turns.pause = lambda host, seconds: None
    with pytest.raises(RowError) as caught:
        fetcher.fetch(site.url("/busy"), into)
    assert caught.value.reason == "http_error"
    assert time.monotonic() - began < 2.5


def test_nonsense_for_a_time_to_wait_is_no_time(site):
    site.answers["/busy"] = http_server.fail_then(1, 503, b"at last", Retry_After="soon")
    assert fetch(site.url("/busy")) == b"at last"


@pytest.mark.parametrize("way", ["hang", "drip_body", "drip_headers"])
def test_a_server_that_never_ends_its_answer_costs_the_time_of_one_file(site, way):
    site.answers["/slow"] = getattr(http_server, way)
    began = time.monotonic()
    error = refused(site.url("/slow"), seconds=1.0)
    assert error.reason == "timeout"
    assert "--fetch-seconds" in error.message
    assert 0.9 < time.monotonic() - began < 4


def test_a_server_that_closes_without_an_answer_is_asked_again(site):
    site.answers["/mute"] = lambda handler: handler.connection.shutdown(socket.SHUT_RDWR)
    error = refused(site.url("/mute"))
    assert error.reason == "read_error"
    assert site.times("/mute") == http.ATTEMPTS


def test_no_server_at_all_is_a_failed_row():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        error = refused(f"http://127.0.0.1:{taken.getsockname()[1]}/")
    assert error.reason == "read_error"
    assert "refused" in error.message


# Size


def test_a_file_of_exactly_the_allowed_size_comes(site):
    site.files["/full"] = bytes(1000)
    assert fetch(site.url("/full"), max_bytes=1000) == bytes(1000)
    assert refused(site.url("/full"), max_bytes=999).reason == "too_many_bytes"


@pytest.mark.parametrize("way", ["flood", "flood_in_chunks", "bomb"])
def test_bytes_without_end_are_cut_at_the_limit_in_bounded_memory(site, way):
    answer = getattr(http_server, way)
    site.answers["/big"] = answer() if way == "bomb" else answer
    tracemalloc.start()
    error = refused(site.url("/big"), max_bytes=5 * 10**6, seconds=60.0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert error.reason == "too_many_bytes"
    assert "--max-bytes" in error.message
    assert peak < 30e6  # 5 MB here, and what the server of the test holds
    assert site.times("/big") == 1


def test_a_length_that_is_too_long_is_refused_before_a_byte_is_read(site):
    site.answers["/long"] = lambda handler: handler.answer(200, b"", Content_Length="5000")
    error = refused(site.url("/long"), max_bytes=1000)
    assert error.reason == "too_many_bytes"
    assert "5,000 bytes" in error.message


def test_an_answer_that_is_cut_short_is_no_file(site):
    site.answers["/cut"] = http_server.promise_more
    assert refused(site.url("/cut")).reason == "read_error"
    assert site.times("/cut") == http.ATTEMPTS


def test_no_more_is_read_than_the_length_says(site):
    site.answers["/more"] = http_server.promise_less
    assert fetch(site.url("/more")) == bytes(10)


def test_an_answer_cut_short_leaves_nothing_of_itself_in_the_next_try(site):
    first = [True]

    def answer(handler):
        handler.answer(200, b"part" if first.pop() else b"whole file", Content_Length="10")
        first.append(False)

    site.answers["/twice"] = answer
    assert fetch(site.url("/twice")) == b"whole file"


# Redirects and hosts


def test_redirects_are_followed_to_their_end(site):
    site.answers |= {"/1": redirect("/2", 301), "/2": redirect(site.url("/a.jpg"), 307)}
    assert fetch(site.url("/1")) == b"picture"


def test_redirects_without_end_stop(site):
    site.answers["/round"] = redirect("/round")
    error = refused(site.url("/round"))
    assert error.reason == "http_error"
    assert "redirects" in error.message
    assert site.times("/round") == http.REDIRECTS + 1


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/a", "gopher://x/"])
def test_a_redirect_to_no_http_address_is_not_followed(site, target):
    site.answers["/out"] = redirect(target)
    assert refused(site.url("/out")).reason == "bad_address"


def test_a_redirect_to_a_private_host_is_refused(site, monkeypatch):
    """The first host is allowed by its name; where it sends is this machine all the same."""
    ask = socket.getaddrinfo
    names = {"photos.example": "127.0.0.1"}
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: ask(names.get(host, host), *rest, **more)
    )
    site.answers["/in"] = redirect(site.url("/a.jpg"))
    error = refused(site.url("/in", "photos.example"), allow=("photos.example",))
    assert error.reason == "host_refused"
    assert "--allow-host 127.0.0.1" in error.message
    assert site.times("/a.jpg") == 0


def test_a_private_host_is_not_connected_to_unless_allowed(site):
    for host in ("127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001"):
        error = refused(site.url("/a.jpg", host), allow=())
        assert error.reason == "host_refused"
    assert not site.asked
    for allow in ("127.0.0.1", "127.0.0.0/8", f"127.0.0.1:{site.port}", "localhost"):
        host = "localhost" if allow == "localhost" else "127.0.0.1"
        assert fetch(site.url("/a.jpg", host), allow=(allow,)) == b"picture"
    assert refused(site.url("/a.jpg"), allow=("127.0.0.1:1",)).reason == "host_refused"


def test_a_name_that_changes_its_meaning_after_the_check_gains_nothing(site, monkeypatch):
    """The address that was checked is the one that is connected to: a name is asked for once."""
    asked: list[str] = []

    def rebinding(host, port, *_, **__):
        asked.append(host)
        address = "203.0.113.1" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    connected = []
    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr("pipeline.fetch.hosts.is_public", lambda a: str(a) == "203.0.113.1")
    monkeypatch.setattr(socket.socket, "connect", lambda self, to: connected.append(to[0]))
    error = refused(site.url("/a.jpg", "evil.example"), allow=())
    assert error.reason == "host_refused"  # the next try asks again, and checks again
    assert connected == ["203.0.113.1"]
    assert asked == ["evil.example"] * 2


def test_one_private_address_among_public_ones_refuses_the_host(monkeypatch):
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80))
        for address in ("93.184.216.34", "10.0.0.7")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    error = refused("http://mixed.example/")
    assert error.reason == "host_refused"
    assert "10.0.0.7" in error.message


def test_a_name_that_nobody_knows_is_not_asked_for_again(monkeypatch):
    asked = []

    def unknown(host, *_, **__):
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert refused("http://nobody.invalid/a.jpg").reason == "read_error"
    assert asked == ["nobody.invalid"]


@pytest.mark.parametrize(
    "address",
    ["http://", "http:///a", "http://a b/", "http://x:99999/", "http://[::1/", "http://\0"],
)
def test_what_is_no_address_says_so(address):
    assert refused(address).reason in ("bad_address", "read_error", "host_refused")


def test_the_environment_cannot_send_requests_through_a_proxy(site, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    assert fetch(site.url("/a.jpg")) == b"picture"


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """Of `secure.example`, and of nobody else; with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "secure.example")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("secure.example")]), False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    path.write_bytes(secret + made.public_bytes(pem))
    return path


@pytest.fixture
def secure(certificate, monkeypatch):
    """A server with that certificate, which its clients trust, under any name that ends so."""
    ask = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *rest, **more: ask(
            "127.0.0.1" if host.endswith(".example") else host, *rest, **more
        ),
    )
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    with serve({"/a.jpg": b"picture"}, context) as found:
        yield found


def test_a_certificate_is_checked_for_the_name_though_the_address_is_connected_to(secure):
    url = secure.url("/a.jpg").replace("http://127.0.0.1", "https://secure.example")
    assert fetch(url) == b"picture"
    assert [headers["host"] for headers in secure.headers] == [f"secure.example:{secure.port}"]
    error = refused(url.replace("secure", "other"))
    assert error.reason == "read_error"
    assert "other.example" in error.message
    assert "tries" not in error.message


def test_a_certificate_that_nobody_vouches_for_is_refused(secure, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    url = secure.url("/a.jpg").replace("http://127.0.0.1", "https://secure.example")
    assert "CERTIFICATE_VERIFY_FAILED" in refused(url).message
    assert not secure.asked


def test_a_drip_is_cut_under_tls_too(secure):
    secure.answers["/slow"] = http_server.drip_body
    url = secure.url("/slow").replace("http://127.0.0.1", "https://secure.example")
    began = time.monotonic()
    assert refused(url, seconds=1.0).reason == "timeout"
    assert time.monotonic() - began < 4


def test_a_server_that_never_ends_the_handshake_is_left():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"https://127.0.0.1:{mute.getsockname()[1]}/"
        began = time.monotonic()
        assert refused(url, seconds=1.0).reason == "timeout"
    assert time.monotonic() - began < 4
