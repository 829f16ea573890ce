"""Downloads from a server on the loopback."""

import http.server
import resource
import socket
import threading

import pytest

from offrl.data.sources.download import fetch
from offrl.errors import DownloadError

BODY = bytes(range(256)) * 8192  # 2 MB, more than one block


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/missing.hdf5":
            self.send_error(404)
            return
        self.send_response(200)
        if self.path != "/unannounced.hdf5":
            self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY[:100_000] if self.path == "/short.hdf5" else BODY)

    def log_message(self, *_):
        pass


@pytest.fixture
def url(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["whole.hdf5", "unannounced.hdf5"])
def test_a_download_arrives_whole_and_alone(url, tmp_path, name):
    path, checked = tmp_path / "new" / name, []
    fetch(f"{url}/{name}", path, check=lambda part: checked.append(part.read_bytes() == BODY))
    assert path.read_bytes() == BODY
    assert checked == [True]
    assert list(path.parent.iterdir()) == [path]


def refused(url, path, words, check=None):
    """A fetch fails with the URL, these words and the alternatives, and leaves nothing."""
    before = {file: file.read_bytes() for file in path.parent.glob("*")}
    with pytest.raises(DownloadError, match=words) as caught:
        fetch(url, path, check)
    told = str(caught.value)
    assert isinstance(caught.value, OSError)
    assert told.startswith(f"cannot download {url}: ")
    assert "source=generated" in told
    assert f"put the file at {path}" in told
    assert "dataset=" in told
    assert {file: file.read_bytes() for file in path.parent.glob("*")} == before


def test_a_short_body_is_refused_and_an_older_file_stays(url, tmp_path):
    path = tmp_path / "short.hdf5"
    path.write_text("older")
    refused(f"{url}/short.hdf5", path, f"the body ended after 100000 of {len(BODY)} bytes")


def test_an_http_error_is_told(url, tmp_path):
    refused(f"{url}/missing.hdf5", tmp_path / "missing.hdf5", "the server answered 404")


def test_no_network_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/any.hdf5"
        refused(url, tmp_path / "any.hdf5", r"no connection \(.*refused")


def test_a_server_that_is_no_web_server_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"SSH-2.0-x\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/any.hdf5"
        refused(url, tmp_path / "any.hdf5", "SSH-2.0")
        thread.join()


def test_a_body_that_fails_its_check_is_refused(url, tmp_path):
    def check(part):
        raise ValueError("this is a web page")

    refused(f"{url}/whole.hdf5", tmp_path / "whole.hdf5", "this is a web page", check)


def test_a_full_disk_is_told(url, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        refused(f"{url}/whole.hdf5", tmp_path / "whole.hdf5", "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_place_that_is_not_writable_is_told(url, tmp_path):
    (tmp_path / "file").write_text("")
    refused(f"{url}/whole.hdf5", tmp_path / "file" / "whole.hdf5", "cannot write to .*OFFRL_HOME")
