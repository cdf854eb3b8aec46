"""A server under attack: one client does its worst in a loop, another makes twelve requests. Linux only.

    python -m benchmarks attacks                              # nano; ATTACKS="deep JSON,pings" for some of them
    PYTHONPATH=/other/tree python -m benchmarks attacks       # the same against other code

A process of its own serves the model with two batch slots and an API key. The attacker has an address of its own
(127.0.0.2), and the key unless its attack is called keyless. Printed are how many of the twelve requests were answered,
the longest time that /healthz took, and the server's memory over that before the attack.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import multiprocessing
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import soundfile

MODEL = os.environ.get("MODEL", "nano")
KEY = "benchmark"
REQUESTS = 12
SECONDS, MAX_SECONDS = 4.0, 60.0
"""Each attack lasts as long as the requests of the other client, but at least and at most so long."""
TIMEOUT = 30.0
"""Of each request of the other client."""
SPEECH = Path(__file__).parents[1] / "omni_jax" / "assets" / "questions" / "sum.wav"
AUTHORIZATION = f"Authorization: Bearer {KEY}\r\n"


def connect(port: int, *, read_little: bool = False) -> socket.socket:
    client = socket.socket()
    client.settimeout(5)
    if read_little:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.bind(("127.0.0.2", 0))
    client.connect(("127.0.0.1", port))
    return client


def head(path: str, length: int | None, kind: str = "application/json", *, keyed: bool = True) -> bytes:
    body = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    key = AUTHORIZATION if keyed else ""
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n{key}{body}\r\n\r\n".encode()


def post(port: int, path: str, body: bytes, kind: str = "application/json", *, keyed: bool = True) -> None:
    """Send a request and wait for what comes."""
    with connect(port) as client:
        client.settimeout(60)
        client.sendall(head(path, len(body), kind, keyed=keyed) + body)
        client.recv(1 << 16)


def chat(**fields: object) -> bytes:
    message = [{"role": "user", "content": "hello"}]
    return json.dumps({"model": Path(MODEL).name, "messages": message, **fields}, separators=(",", ":")).encode()


def frame(data: bytes, opcode: int = 1, *, last: bool = True) -> bytes:
    """A frame of a WebSocket's client, masked with zeros."""
    size = len(data)
    if size < 126:
        begin = struct.pack("!BB", opcode | 128 * last, size | 128)
    elif size < 1 << 16:
        begin = struct.pack("!BBH", opcode | 128 * last, 126 | 128, size)
    else:
        begin = struct.pack("!BBQ", opcode | 128 * last, 127 | 128, size)
    return begin + bytes(4) + data


def event(type: str, **fields: object) -> bytes:
    """The frame of an event of the Realtime API."""
    return frame(json.dumps({"type": type, **fields}).encode())


def message(**content: object) -> bytes:
    """The frame of a message of the user."""
    return event("conversation.item.create", item={"type": "message", "role": "user", "content": [content]})


def upgrade(key: str = "") -> bytes:
    """The request that opens a session of the Realtime API."""
    return (
        f"GET /v1/realtime HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        "Upgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


def websocket(port: int, *, read_little: bool = False) -> socket.socket:
    client = connect(port, read_little=read_little)
    client.sendall(upgrade(KEY))
    client.recv(4096)
    return client


def write_long_recording(path: Path) -> None:
    """An hour of speech in a few megabytes."""
    samples, rate = soundfile.read(SPEECH, dtype="float32")
    hour = np.resize(samples, 3590 * rate)
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", rate, 1, "OPUS", format="OGG", compression_level=0.99) as writer:
        for start in range(0, len(hour), 1 << 16):
            writer.write(hour[start : start + (1 << 16)])
    path.write_bytes(file.getvalue())


def long_recording() -> bytes:
    """What was written, for the attacker's process."""
    return Path(os.environ["LONG_RECORDING"]).read_bytes()


def form(recording: bytes) -> bytes:
    fields = f'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n{Path(MODEL).name}\r\n'.encode()
    file = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    return fields + file + recording + b"\r\n--b--\r\n"


def huge_options(port: int, until: float) -> None:
    options = {"top_k": 10**12, "temperature": 1e308, "max_steps": 10**18, "seed": 2**40, "max_output_tokens": 10**18}
    while time.monotonic() < until:
        for name, value in options.items():
            with websocket(port) as client:
                client.sendall(event("session.update", session={"type": "realtime", name: value}))
                client.sendall(message(type="input_text", text="hello") + event("response.create"))
                client.recv(1 << 16)
            post(port, "/v1/chat/completions", chat(**{name: value}))


def keyless_bodies(port: int, until: float) -> None:
    body = b'{"audio": "' + b"A" * (30 << 20) + b'"}'
    while time.monotonic() < until:
        post(port, "/chat", body, keyed=False)


def keyless_first_message(port: int, until: float) -> None:
    data = b'{"type": "session.update", "session": {"a": [' + b"0," * (15 << 20) + b"0]}}"
    while time.monotonic() < until:
        with connect(port) as client:
            client.settimeout(60)
            client.sendall(upgrade() + frame(data))
            client.recv(4096)


def many_messages(port: int, until: float) -> None:
    body = chat(messages=[{}] * 3_000_000)
    while time.monotonic() < until:
        post(port, "/v1/chat/completions", body)


def deep_json(port: int, until: float) -> None:
    body = b'{"messages": ' + b'[{"a":' * (5 << 20)
    while time.monotonic() < until:
        post(port, "/v1/chat/completions", body)


def slow_uploads(port: int, until: float) -> None:
    clients = [connect(port) for _ in range(60)]
    for client in clients:
        client.sendall(head("/chat", 30 << 20) + b'{"audio": "' + b"A" * 100_000)
    while time.monotonic() < until:
        time.sleep(1)
        for client in clients:
            with contextlib.suppress(OSError):
                client.sendall(b"A")


def half_open(port: int, until: float) -> None:
    clients: list[socket.socket] = []
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            client = connect(port)
            client.sendall(b"POST /chat HTTP/1.1\r\nHost: localhost\r\nX: ")
            clients.append(client)
        if len(clients) > 900:
            clients.pop(0).close()


def never_reads(port: int, until: float) -> None:
    get = f"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n{AUTHORIZATION}\r\n".encode() * 500
    post(port, "/v1/chat/completions", chat(stream=True, max_completion_tokens=20))
    clients: list[socket.socket] = []
    while time.monotonic() < until:
        client = connect(port, read_little=True)
        clients.append(client)
        client.settimeout(0.2)
        client.sendall(get)


def send_forever(client: socket.socket, data: bytes, until: float) -> None:
    while time.monotonic() < until:
        client.sendall(data)


def tiny_frames(port: int, until: float) -> None:
    with websocket(port) as client:
        # Nothing answers them: the attacker need not read.
        send_forever(client, (frame(b"", 10) * 10 + event("input_audio_buffer.append", audio="")) * 400, until)


def tiny_fragments(port: int, until: float) -> None:
    with websocket(port) as client:
        client.sendall(frame(b"", 2, last=False))
        send_forever(client, frame(b"", 0, last=False) * 4000, until)


def pings(port: int, until: float) -> None:
    with websocket(port, read_little=True) as client:
        send_forever(client, frame(b"a" * 125, 9) * 500, until)


def tiny_chunks(port: int, until: float) -> None:
    with connect(port) as client:
        client.sendall(head("/chat", None))
        send_forever(client, b"1\r\na\r\n" * 4000, until)


def many_parts(port: int, until: float) -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' * 500_000
    while time.monotonic() < until:
        post(port, "/v1/audio/transcriptions", body, "multipart/form-data; boundary=b")


def long_recordings(port: int, until: float) -> None:
    body = form(long_recording())
    while time.monotonic() < until:
        with connect(port) as client:
            client.settimeout(max(1, min(20, until - time.monotonic())))
            client.sendall(head("/v1/audio/transcriptions", len(body), "multipart/form-data; boundary=b") + body)
            with contextlib.suppress(TimeoutError):
                client.recv(4096)


def canceled_recordings(port: int, until: float) -> None:
    """The largest that a message may have: 50 minutes in G.711."""
    recording = message(type="input_audio", audio=base64.b64encode(bytes(24_000_000)).decode())
    with websocket(port) as client:
        client.sendall(event("session.update", session={"input_audio_format": "g711_ulaw"}))
        while time.monotonic() < until:
            client.sendall(recording + event("response.create") + event("response.cancel"))
            client.settimeout(30)
            client.recv(1 << 16)


def false_headers(port: int, until: float) -> None:
    """GSM in wav whose header claims 48 GB."""
    coding = struct.pack("<HHIIHHHH", 0x31, 65535, 2**31 - 1, 2**31 - 1, 65535, 0, 2, 65535)
    wave = b"WAVEfmt " + struct.pack("<I", len(coding)) + coding + b"data" + struct.pack("<I", 2**32 - 8) + b"\1" * 1700
    body = form(b"RIFF" + struct.pack("<I", 2**32 - 1) + wave)
    while time.monotonic() < until:
        post(port, "/v1/audio/transcriptions", body, "multipart/form-data; boundary=b")


def idle_websockets(port: int, until: float) -> None:
    clients: list[socket.socket] = []
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            clients.append(websocket(port))


ATTACKS: dict[str, Callable[[int, float], None]] = {
    "huge options": huge_options,
    "keyless 30 MB bodies": keyless_bodies,
    "keyless 30 MB first message": keyless_first_message,
    "3 million messages": many_messages,
    "deep JSON": deep_json,
    "slow uploads": slow_uploads,
    "half-open connections": half_open,
    "idle WebSockets": idle_websockets,
    "answers never read": never_reads,
    "tiny frames": tiny_frames,
    "tiny fragments": tiny_fragments,
    "pings": pings,
    "tiny chunks": tiny_chunks,
    "multipart of many parts": many_parts,
    "recordings of an hour": long_recordings,
    "canceled recordings of 24 MB": canceled_recordings,
    "wav that claims 48 GB": false_headers,
}


def attack(name: str, port: int, stop: float) -> None:
    """The attacker's process: again, whenever the server has ended the attempt, until it is stopped."""
    while time.monotonic() < stop:
        with contextlib.suppress(OSError, http.client.HTTPException):
            ATTACKS[name](port, stop)
        time.sleep(0.05)


def ask(port: int) -> bool:
    """One request of the other client."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    try:
        connection.request("POST", "/v1/chat/completions", chat(max_completion_tokens=20), headers)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class Watch(threading.Thread):
    """Asks /healthz ten times a second, and measures the server's memory."""

    def __init__(self, port: int, process: psutil.Process):
        super().__init__()
        self.port, self.process = port, process
        self.worst = 0.0
        self.idle = self.peak = process.memory_info().rss
        self.done = threading.Event()

    def run(self) -> None:
        """Ask until it is done."""
        memory = threading.Thread(target=self.watch_memory)
        memory.start()
        while not self.done.wait(0.1):
            start = time.perf_counter()
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            try:
                connection.request("GET", "/healthz")
                connection.getresponse().read()
            except (OSError, http.client.HTTPException):
                self.worst = max(self.worst, 60.0)
            connection.close()
            self.worst = max(self.worst, time.perf_counter() - start)
        memory.join()

    def watch_memory(self) -> None:
        """Note the peak until it is done."""
        with contextlib.suppress(psutil.NoSuchProcess):
            while not self.done.wait(0.02):
                self.peak = max(self.peak, self.process.memory_info().rss)


class AttackedServer:
    """`omni-jax serve` in a process of its own, of the code that PYTHONPATH names."""

    def __init__(self, folder: Path):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = int(found.getsockname()[1])
        keys = folder / "keys.txt"
        keys.write_text(KEY)
        paths = (os.environ.get("PYTHONPATH") or str(Path(__file__).parents[1])).split(os.pathsep)
        model = str(Path(MODEL).resolve()) if Path(MODEL).exists() else MODEL
        command = ["serve", "--model", model, "--port", str(self.port), "--max-batch-size", "2"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "omni_jax.cli", *command, "--api-key-file", str(keys)],
            # Else Python would take the package of the current folder.
            cwd=folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(str(Path(path).resolve()) for path in paths)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not self.is_ready():
            if self.process.poll() is not None:
                raise RuntimeError("the server has exited")
            time.sleep(0.3)
        for _ in range(3):
            ask(self.port)

    def is_ready(self) -> bool:
        """Whether every program is compiled."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"})
            return b"omni_compiled 1.0" in connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def stop(self) -> None:
        """End the process."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def measure(server: AttackedServer, name: str) -> tuple[int, float, float]:
    """How many requests were answered, the worst delay in ms, and the memory over idle in MB."""
    watch = Watch(server.port, psutil.Process(server.process.pid))
    watch.start()
    began = time.monotonic()
    attacker = multiprocessing.get_context("spawn").Process(target=attack, args=(name, server.port, began + 300))
    attacker.start()
    time.sleep(1.5)
    answered = 0
    for _ in range(REQUESTS):
        if server.process.poll() is None and time.monotonic() < began + MAX_SECONDS:
            answered += ask(server.port)
    time.sleep(max(0.0, began + SECONDS - time.monotonic()))
    attacker.terminate()
    attacker.join()
    watch.done.set()
    watch.join()
    return answered, 1000 * watch.worst, (watch.peak - watch.idle) / 1e6


def main() -> None:
    chosen = os.environ.get("ATTACKS", ",".join(ATTACKS)).split(",")
    with tempfile.TemporaryDirectory() as temporary:
        folder, server = Path(temporary), None
        os.environ["LONG_RECORDING"] = str(folder / "hour.ogg")
        write_long_recording(folder / "hour.ogg")
        print(f"{MODEL}, 2 batch slots; another client makes {REQUESTS} requests meanwhile")
        print(f"{'attack':<30} {'answered':>8} {'worst /healthz, ms':>19} {'memory over idle, MB':>21}", flush=True)
        for name in chosen:
            if server is None or server.process.poll() is not None or not server.is_ready():
                if server is not None:
                    server.stop()
                server = AttackedServer(folder)
            answered, worst, memory = measure(server, name)
            print(f"{name:<30} {answered:>5}/{REQUESTS} {worst:>19.0f} {memory:>21.0f}", flush=True)
            time.sleep(1)
        if server is not None:
            server.stop()


if __name__ == "__main__":
    main()
