"""`steerfm report`: a page served to this machine alone, and files for a paper."""

from __future__ import annotations

import http.client
import os
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_runs import make_run

from steerfm import report
from steerfm.cli import main, parse
from steerfm.errors import RunError
from steerfm.report.serve import HOST, STRICTEST, PageServer, page_of, policy
from steerfm.runs import Run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of two runs and their comparison."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder, "base")
    make_run(folder, "best of 16")
    report.write_comparison(report.compare(["base", "best-of-16"], root=folder), folder / "compared")
    (folder / "secret.txt").write_text("secret")
    (folder / "compared" / "curves.png").symlink_to(folder / "secret.txt")
    return folder


@pytest.fixture
def server(root: Path) -> Iterator[PageServer]:
    """Serve the comparison from a thread."""
    with PageServer(page_of("compared", root)) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def ask(
    server: PageServer, target: str, method: str = "GET", headers: dict[str, str] | None = None
) -> tuple[http.client.HTTPResponse, bytes]:
    """Send one request with its target as it is, and return the answer and its body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    try:
        connection.request(method, target, headers={"Host": f"localhost:{server.server_port}"} | (headers or {}))
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    """Run a command in process; return its exit code, what it printed, and what it said on stderr."""
    code = main(list(map(str, argv)))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_page_is_served_as_it_is(server: PageServer, root: Path) -> None:
    page = (root / "compared" / "page.html").read_bytes()
    for target in ("/", "/page.html", "/?x=1"):
        answer, body = ask(server, target)
        assert (answer.status, body) == (200, page)
        assert answer.getheader("Content-Type") == "text/html; charset=utf-8"
        assert answer.getheader("Content-Security-Policy") == policy(page)
        assert answer.getheader("X-Content-Type-Options") == "nosniff"
    assert "default-src 'none'" in policy(page)
    assert policy(page) != STRICTEST, "the page's own policy was not found"
    answer, body = ask(server, "/", "HEAD")
    assert (answer.status, body, answer.getheader("Content-Length")) == (200, b"", str(len(page)))


def test_the_files_beside_it_are_served(server: PageServer, root: Path) -> None:
    for name, kind in (
        ("table.json", "application/json"),
        ("table.md", "text/markdown"),
        ("pictures.png", "image/png"),
    ):
        answer, body = ask(server, f"/{name}")
        assert (answer.status, body) == (200, (root / "compared" / name).read_bytes())
        assert str(answer.getheader("Content-Type")).startswith(kind)
        assert answer.getheader("Content-Security-Policy") == STRICTEST


@pytest.mark.parametrize(
    "target",
    [
        "/run.json", "/config.yaml", "/../secret.txt", "/%2e%2e/secret.txt", "/..%2fsecret.txt", "//page.html/..",
        "/./page.html", "/..", "/.", "/curves.png", "/page.html/", "/page.html%00", "/missing.html", "/PAGE.HTML",
        "http://elsewhere/page.html", "/\\page.html",
    ],
)  # fmt: skip
def test_nothing_else_is_served(server: PageServer, target: str) -> None:
    answer, body = ask(server, target)
    assert answer.status == 404
    assert b"secret" not in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE"])
def test_it_can_only_be_read(server: PageServer, method: str) -> None:
    assert ask(server, "/", method)[0].status == 501


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "localhost.evil.example:{port}", ""]
)
def test_a_page_elsewhere_cannot_reach_it_by_a_name_of_its_own(server: PageServer, host: str) -> None:
    answer, body = ask(server, "/", headers={"Host": host.format(port=server.server_port)})
    assert answer.status == 421
    assert b"base" not in body


def test_a_connection_that_breaks_is_not_spoken_of(server: PageServer, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_connection((HOST, server.server_port), timeout=10) as connection:
        connection.sendall(f"HEAD / HTTP/1.1\r\nHost: {HOST}:{server.server_port}\r\n\r\n".encode())
        assert b"200" in connection.recv(65536)  # so that a thread is there, and waits for more
        assert any("process_request_thread" in thread.name for thread in threading.enumerate())
        connection.sendall(b"GET / HTTP/1.1\r\n")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets it
    before = time.monotonic()
    while any("process_request_thread" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < before + 20
        time.sleep(0.01)
    assert capfd.readouterr().err == ""


def test_it_listens_on_this_machine_alone(server: PageServer) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"
    assert server.address == f"http://127.0.0.1:{server.server_port}/"
    assert ask(server, "/", headers={"Host": f"localhost:{server.server_port}"})[0].status == 200


def test_nonsense_does_not_end_it(server: PageServer) -> None:
    for nonsense in (b"\x00\xff\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"G" * 70_000 + b"\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
            connection.sendall(nonsense)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
    assert ask(server, "/")[0].status == 200


def test_a_page_that_is_written_again_is_shown(server: PageServer, root: Path) -> None:
    page = root / "compared" / "page.html"
    before = page.read_bytes()
    try:
        page.write_text("<p>new</p>")
        answer, body = ask(server, "/")
        assert body == b"<p>new</p>"
        assert answer.getheader("Content-Security-Policy") == STRICTEST
        page.unlink()
        assert ask(server, "/")[0].status == 404
    finally:
        page.write_bytes(before)


def test_a_run_without_a_page_says_how_to_make_one(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "report", "show", "base", "--root", root)
    assert (code, out) == (2, "")
    assert "has no page.html" in err
    assert "steerfm compare 'runs=[base]' name=NAME, then steerfm report show NAME." in err
    code, _, err = run(capsys, "report", "show", "comparde", "--root", root)
    assert code == 2
    assert "did you mean 'compared'?" in err


@pytest.mark.parametrize("port", [-1, 70_000])
def test_a_port_that_is_none_is_refused(root: Path, port: int) -> None:
    with pytest.raises(RunError, match=f"Cannot listen on port {port} .* use --port 0"):
        PageServer(page_of("compared", root), port)


def test_a_port_that_is_taken_is_refused(server: PageServer, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["report", "show", "compared", "--root", root, "--no-browser", "--port", str(server.server_port)]
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "use --port 0" in err


def test_ctrl_c_ends_it_cleanly(root: Path) -> None:
    command = [sys.executable, "-m", "steerfm.cli", "report", "show", str(root / "compared"), "--no-browser"]
    shown = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert shown.stdout is not None
        line = shown.stdout.readline()
        port = int(line.rpartition("http://127.0.0.1:")[2].partition("/")[0])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(b"GET /missing HTTP/1.1\r\n\r\n")
            assert b"421" in connection.recv(65536)  # and an open connection does not hold it up
            shown.send_signal(signal.SIGINT)
            out, err = shown.communicate(timeout=20)
    finally:
        shown.kill()
    assert (shown.returncode, err) == (0, "")
    assert out == "Stopped.\n"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_the_browser_is_sent_to_the_address(
    root: Path, sent: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = []

    def visit(address: str) -> bool:
        opened.append(address)
        threading.Thread(target=lambda: (time.sleep(0.2), os.kill(os.getpid(), sent))).start()
        return True

    monkeypatch.setattr("webbrowser.open", visit)
    code, out, _ = run(capsys, "report", "show", "compared", "--root", root)
    assert code == 0
    assert opened[0] in out
    assert out.endswith("Stopped.\n")


def test_the_files_for_a_paper_are_written(root: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "report", "export", "compared", "--root", root, "--format", "tex", "md", "png")
    assert (code, err) == (0, "")
    written = sorted(path.relative_to(workplace).as_posix() for path in workplace.rglob("*.*"))
    assert written == sorted(out.split())
    assert "export/compared/quality.tex" in written
    assert "export/compared/pictures.png" in written
    again = run(capsys, "report", "export", root / "compared", "--folder", "paper", "--format", "md")
    assert again == (0, "paper/table.md\n", "")


def test_a_comparison_made_by_recipe_is_exported(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in ("base", "sweep/best-1", "sweep/best-2"):
        make_run(workplace / "runs", "base" if place == "base" else "best of 16", name=place)
    lines = "lines={picking:{best of n:[sweep/best-1,sweep/best-2]}}"
    assert run(capsys, "compare", "runs=[base,sweep]", lines, "name=by_recipe")[0] == 0
    assert run(capsys, "report", "export", "by_recipe", "--format", "svg", "tex")[0] == 0
    table = (workplace / "export" / "by_recipe" / "quality.tex").read_text(encoding="utf-8")
    assert re.findall(r"^(base|best of 16 .*?) &", table, re.MULTILINE) == [
        "base", r"best of 16 (sweep/best-1)", r"best of 16 (sweep/best-2)",
    ]  # fmt: skip
    assert "picking" in (workplace / "export" / "by_recipe" / "plots.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["base"], "a finished comparison is needed"),
        (["compared", "--format", "jpg"], "Unknown format 'jpg'"),
        (["compared", "--seeds", "0"], "at least 1 prompt and 1 seed"),
        (["nothing"], "No run at nothing"),
    ],
)
def test_a_wrong_export_is_one_sentence(
    root: Path, workplace: Path, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "report", "export", *argv, "--root", root)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert list(workplace.iterdir()) == []


def test_a_changed_run_is_warned_of(tmp_path: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = make_run(tmp_path, "base")
    report.write_comparison(report.compare(["base"], root=tmp_path), tmp_path / "compared")
    text = (first.folder / "run.json").read_text(encoding="utf-8")
    (first.folder / "run.json").write_text(text.replace(first.info.fingerprint, "f" * 16), encoding="utf-8")
    code, out, _ = run(capsys, "report", "export", "compared", "--root", tmp_path, "--format", "md")
    assert code == 0
    assert "has changed since it was compared" in out


def test_the_guide_says_what_works(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "comparing.md").read_text(encoding="utf-8")
    for label, name in (("base", "base"), ("tilting, T = 0.1", "steered"), ("fine-tuned, T = 0.1", "tuned")):
        make_run(workplace / "runs", label, name=name)
    report.write_comparison(report.compare(["base", "steered", "tuned"]), "runs/comparison")
    shown, exported = re.findall(r"^steerfm (report (?:show|export) .*)$", text, re.MULTILINE)
    assert parse(shlex.split(shown)).browser
    assert run(capsys, *shlex.split(exported))[0] == 0
    files = text.partition("## Look at it, and write it for a paper")[2].partition("## In a notebook")[0]
    written = {path.name for path in (workplace / "paper").iterdir()}
    assert written == {f"{stem}.{kind}" for stem in ("pictures", "plots") for kind in ("png", "pdf", "svg")} | set(
        re.findall(r"\b(\w+\.(?:tex|md))`", files.partition("Words in PDF")[0])
    )
    (snippet,) = re.findall(r"## In a notebook\n```python\n(.*?)```", text, re.DOTALL)
    exec(compile(snippet, "comparing.md", "exec"), {"report": report})


def test_publishing_prints_where_it_is(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def publish(folder: Path, *, project: str = "", entity: str = "") -> str:
        return f"https://elsewhere/{entity}/{project}/{Run.open(folder).info.name}"

    monkeypatch.setitem(sys.modules, "steerfm.report.published", types.SimpleNamespace(publish=publish))
    arguments = ["report", "publish", root / "compared", "--project", "maps", "--entity", "us"]
    assert run(capsys, *arguments) == (0, "https://elsewhere/us/maps/compared\n", "")
