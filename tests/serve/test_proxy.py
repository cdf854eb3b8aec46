"""The page and OpenAI's client behind nginx, with the configuration that docs/serving.md prints."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.serve.conftest import RunningServer, assert_same_audio, eventually
from tests.serve.test_page import browser, played, playwright, until  # noqa: F401  (two are fixtures)

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not NGINX, reason="the proxy is nginx, which is not installed"),
]

CONFIG = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
{user}
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {map}
    server {{
        listen 127.0.0.1:{port};
        {location}
    }}
}}
"""


@pytest.fixture(scope="module")
def proxy(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the server behind nginx."""
    assert NGINX is not None
    documented = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    location, connection = re.findall(r"```nginx\n(.*?)```", documented, re.DOTALL)
    folder = tmp_path_factory.mktemp("nginx")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = folder / "nginx.conf"
    config.write_text(
        CONFIG.format(
            folder=folder,
            user="user root;" if os.geteuid() == 0 else "",
            map=connection,
            port=port,
            location=location.replace("http://127.0.0.1:8000", server.url),
        )
    )
    process = subprocess.Popen([NGINX, "-p", str(folder), "-c", str(config)])
    url = f"http://127.0.0.1:{port}/talk"

    def running() -> bool:
        assert process.poll() is None, (folder / "error.log").read_text()
        try:
            return urllib.request.urlopen(f"{url}/readyz", timeout=5).status == 200
        except urllib.error.URLError:
            return False

    eventually(running)
    yield url
    process.terminate()
    process.wait(30)


def test_page_behind_a_proxy(browser: Any, proxy: str, server: RunningServer) -> None:  # noqa: F811
    page = browser.new_page()
    failed: list[str] = []
    page.on("response", lambda response: failed.append(response.url) if response.status >= 400 else None)
    page.goto(f"{proxy}/")
    until(page, "document.getElementById('state').textContent === 'Ready.'")
    page.fill("#text", "hello")
    page.press("#text", "Enter")
    assert_same_audio(played(page), server.omni.reply(text="hello").audio)
    assert not failed
    page.close()


def test_openai_client_behind_a_proxy(proxy: str, server: RunningServer) -> None:
    with openai.OpenAI(base_url=f"{proxy}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="small", messages=[{"role": "user", "content": "hello"}], stream=True
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == server.omni.answer(text="hello").text
