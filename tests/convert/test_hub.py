"""Downloads by the real client from a server in this process that answers as the hub does."""

import hashlib
import http.server
import json
import re
import subprocess
import sys
import threading

import pytest

import ttt_jax
from ttt_jax.convert import hub, sources
from ttt_jax.convert.program import Options, convert, plan

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """Serves one repository; cuts the first answer for `cut` half-way."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cut, self.ranges = files, None, []

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if self.path.startswith("/api/models/owner/name"):
            siblings = [{"rfilename": name} for name in self.server.files]
            tree = [{"type": "file", "path": n, "size": len(x), "oid": "0"} for n, x in self.server.files.items()]
            info = {"id": "owner/name", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            return self.answer(json.dumps(tree if "/tree/" in self.path else info).encode(), {})
        match = re.fullmatch(r"/owner/name/resolve/[^/]+/(.+)", self.path.partition("?")[0])
        content = match and self.server.files.get(match[1])
        if content is None:
            return self.answer(b"{}", {"X-Error-Code": "RepoNotFound"}, 404)
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        start = int(re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range") or "bytes=0-")[1])
        if start:
            self.server.ranges.append((match[1], start))
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.command == "GET" and self.server.cut == match[1]:
            self.server.cut = None
            self.answer(content, headers, sent=len(content) // 2)
            self.close_connection = True
            return None
        return self.answer(content[start:], headers, 206 if start else 200)

    def answer(self, content: bytes, headers: dict, status: int = 200, sent: int | None = None):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:sent])


@pytest.fixture
def repository(data_dir):
    names = {"model.safetensors": "moshi_tiny.safetensors", "config.json": "moshi_tiny.json"}
    files = {name: (data_dir / source).read_bytes() for name, source in names.items()}
    with Hub(files | {"README.md": b"not wanted"}) as server:
        yield server


DOWNLOAD = """
import sys
from ttt_jax.convert import hub, sources

print(hub.download("owner/name", lambda folder: sources.wanted_of_repository(sys.argv[1], folder)))
"""


def download(server, cache, kind="moshi"):
    """In a process of its own, since the client reads its settings when it is imported."""
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HOME": str(cache)}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PATH": ""}
    return subprocess.run(
        [sys.executable, "-c", DOWNLOAD, kind],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_repository_is_downloaded_and_converted(data_dir, tmp_path, repository):
    done = download(repository, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    folder = done.stdout.strip()
    assert sorted(path.name for path in (tmp_path / "cache").rglob("*.*") if path.is_symlink()) == [
        "config.json",
        "model.safetensors",
    ]
    convert(plan("moshi", folder, Options()), tmp_path / "out")
    assert ttt_jax.load(tmp_path / "out")[0].dim == 64


@pytest.mark.parametrize(
    ("kind", "config", "weights"),
    [
        ("moshi", {}, {"model.safetensors"}),
        ("mimi", {"mimi_name": "codec.safetensors"}, {"codec.safetensors"}),
        ("moshi", {"mimi_name": "codec.safetensors"}, {"model.safetensors", sources.MIMI_FILE}),
        ("mimi", {}, {sources.MIMI_FILE}),
        ("mimi", {"model_type": "mimi"}, {"model.safetensors", "codec.safetensors", sources.MIMI_FILE}),
    ],
)
def test_only_the_weights_of_the_model_are_downloaded(tmp_path, repository, kind, config, weights):
    files = dict.fromkeys(("model.safetensors", "codec.safetensors", sources.MIMI_FILE), b"x")
    repository.files |= files | {"config.json": json.dumps(config).encode()}
    if (kind, config) == ("moshi", {}):
        del repository.files["codec.safetensors"]
    done = download(repository, tmp_path / "cache", kind)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "cache").rglob("*.safetensors")} == weights


def test_a_download_that_was_cut_goes_on(tmp_path, repository):
    large = bytes(range(256)) * 2**17  # the client writes 10 MiB at a time
    repository.files["large.safetensors"], repository.cut = large, "large.safetensors"
    if download(repository, tmp_path / "cache").returncode:  # the client may go on by itself
        assert download(repository, tmp_path / "cache").returncode == 0
    assert any(name == "large.safetensors" and 0 < start < len(large) for name, start in repository.ranges)
    [file] = [path for path in (tmp_path / "cache").rglob("large.safetensors") if path.is_symlink()]
    assert file.read_bytes() == large


def test_a_repository_that_does_not_exist(tmp_path, repository):
    repository.files.clear()
    repository.files["README.md"] = b""
    repository.RequestHandlerClass = NotFound
    done = download(repository, tmp_path / "cache")
    assert done.returncode == 1
    assert "--input: owner/name is no path here and could not be downloaded" in done.stderr
    assert "hf auth login" in done.stderr


class NotFound(Handler):
    def do_GET(self):
        self.answer(b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}, 404)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"no path here; .*pip install 'ttt-jax\[hub\]'"):
        plan("moshi", "kyutai/moshiko-pytorch-bf16", Options())


def test_paths_are_no_repositories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not hub.is_repository("owner/name")
    assert hub.is_repository("owner/other")
    assert not hub.is_repository("owner/name/file.safetensors")
    assert not hub.is_repository("./owner")
