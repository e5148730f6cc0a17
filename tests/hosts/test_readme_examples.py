"""The examples of the HTTP API in docs/api.md, executed as they stand."""

import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from host import RunningHost
from PIL import Image

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:7860"


def example(language):
    return re.search(rf"```{language}\n(.*?{ADDRESS}.*?)```", PAGE, re.S)[1]


@pytest.fixture
def address(host):
    """Where the host listens; the stand-in does so for this one test."""
    if isinstance(host, RunningHost):
        yield host.url
        return

    class Bridge(BaseHTTPRequestHandler):
        def do_POST(self):
            status, answer = host.call(
                self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            )
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Bridge) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def its_loras(host):
    """The two files that the examples name."""
    copies = []
    for name, of in (("my_dog", host.subject), ("watercolor", host.style)):
        copies.append(host.file(of).with_name(f"{name}.safetensors"))
        shutil.copy(host.file(of), copies[-1])
    host.call("/sdapi/v1/refresh-loras", {})
    yield
    for copy in copies:
        copy.unlink()
    host.call("/sdapi/v1/refresh-loras", {})


def run(command, folder):
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=True).stdout


@pytest.mark.skipif(not (shutil.which("bash") and shutil.which("curl")), reason="needs bash and curl")
def test_curl(address, tmp_path):
    answer = json.loads(run(["bash", "-c", example("bash").replace(ADDRESS, address)], tmp_path))
    assert "K-LoRA subject: my_dog" in json.loads(answer["info"])["infotexts"][0]


def test_python(address, tmp_path):
    said = run([sys.executable, "-c", example("python").replace(ADDRESS, address)], tmp_path)
    assert said.startswith("gamma ")
    assert Image.open(tmp_path / "dog.png").size[0] >= 64
