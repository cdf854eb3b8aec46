"""`omni-jax serve`: the HTTP server."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from omni_jax.cli.console import echo_err
from omni_jax.cli.loading import load_model, tensor_mesh
from omni_jax.cli.options import Codec, Int8, MaxBatchSize, Model, ShortWindows, Tensor
from omni_jax.errors import ConfigError
from omni_jax.log import log_to_stderr
from omni_jax.serve.malloc import limit_heap_growth

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    model: Model = "nano",
    codec: Codec = "jax",
    int8: Int8 = False,
    short_windows: ShortWindows = False,
    host: Annotated[
        str,
        typer.Option(
            help="Address to bind. 127.0.0.1 accepts connections from this machine only; 0.0.0.0 from the network."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to bind; 0: any that is free.")] = 8000,
    max_batch_size: MaxBatchSize = 8,
    tensor: Tensor = 1,
    max_queue_size: Annotated[
        int, typer.Option(min=0, help="Requests that may wait for a batch slot; more get status 429.")
    ] = 64,
    cache_memory: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="GB of memory for the keys and values of the requests that are answered, which take it as they grow. "
            "Default: enough for --max-batch-size requests of full length, each with a companion row.",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="File with one API key per line; requests must send one of them. Default: no key needed."),
    ] = None,
    max_audio_seconds: Annotated[
        float, typer.Option(min=0.1, help="Longest recording, where the model takes so much: to transcribe.")
    ] = 3600.0,
    model_alias: Annotated[
        list[str] | None,
        typer.Option(help="Another name of the model, as NAME=MODEL: whisper-1=nano. Can be repeated."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin whose pages may use the server, such as https://example.org; *: any. Can be repeated."
        ),
    ] = None,
    public_url: Annotated[
        str | None,
        typer.Option(help="Where a proxy serves this server, such as https://omni.example.org."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name by which clients reach the server, such as omni.lan; *: any. localhost and addresses need none. "
            "Can be repeated."
        ),
    ] = None,
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(help="Address of a proxy, whose X-Forwarded-For header is believed. Can be repeated."),
    ] = None,
    max_connections: Annotated[
        int, typer.Option(min=4, help="Connections at once; a client has at most a quarter of them.")
    ] = 1024,
    max_body_bytes: Annotated[int, typer.Option(min=1024, help="Largest request body.")] = 32 << 20,
    request_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds after which a request is canceled, time in the queue included.")
    ] = 120.0,
    idle_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds after which a client that sends or reads nothing is disconnected.")
    ] = 30.0,
) -> None:
    """Serve a web page and OpenAI's endpoints.

    Requests are decoded in one running batch (continuous batching). /metrics has metrics for Prometheus.
    """
    # Before the model is loaded: a missing extra is reported at once.
    from omni_jax.serve.app import make_server
    from omni_jax.serve.binding import bind
    from omni_jax.serve.sessions import Service, Settings

    limit_heap_growth()
    keys = read_keys(api_key_file) if api_key_file is not None else ()
    name = Path(model).name or model
    origins = _origins([*(allow_origin or []), *([public_url] if public_url else [])])
    public_host = [urlsplit(public_url).hostname or ""] if public_url else []
    settings = Settings(
        max_batch_size=max_batch_size,
        max_queue_size=max_queue_size,
        cache_bytes=None if cache_memory is None else cache_memory * 1e9,
        max_audio_seconds=max_audio_seconds,
        max_body_bytes=max_body_bytes,
        request_timeout=request_timeout,
        idle_timeout=idle_timeout,
        api_keys=keys,
        aliases=_aliases(model_alias or [], name),
        allowed_origins=origins,
        allowed_hosts=_hosts([*(allow_host or []), *public_host, host]),
        trusted_proxies=_addresses(trusted_proxy or []),
        max_connections=max_connections,
    )
    if not keys and host not in LOOPBACK:
        echo_err(f"note: {host}:{port} accepts requests from the network without a key; see --api-key-file")
    log_to_stderr()
    with bind(host, port) as sockets:
        omni = load_model(model, codec, int8=int8, short_windows=short_windows, mesh=tensor_mesh(tensor))
        try:
            service = Service(omni, name, settings)
        except ConfigError as error:
            raise error.prefixed("--cache-memory") if error.field == "cache_bytes" else error from None
        make_server(service).run([*sockets])


def _aliases(options: list[str], name: str) -> tuple[str, ...]:
    aliases = []
    for option in options:
        alias, separator, model = option.partition("=")
        if not alias or not separator or model != name:
            raise ConfigError(f"--model-alias: expected NAME={name}, found {option!r}")
        aliases.append(alias)
    return tuple(aliases)


def _origins(addresses: list[str]) -> tuple[str, ...]:
    """The origins, scheme and host, of some addresses."""
    origins = []
    for address in addresses:
        parts = urlsplit(address)
        if address != "*" and not (parts.scheme in ("http", "https") and parts.netloc):
            raise ConfigError(f"--allow-origin, --public-url: expected https://HOST, found {address!r}")
        origins.append(address if address == "*" else f"{parts.scheme}://{parts.netloc}".lower())
    return tuple(origins)


def _hosts(names: list[str]) -> tuple[str, ...]:
    """The names of hosts in lower case."""
    for name in names:
        if not name or set(name) & set("/@ "):
            raise ConfigError(f"--allow-host: expected the name of a host, such as omni.lan, found {name!r}")
    return tuple(dict.fromkeys(name.lower().rstrip(".") for name in names if not _is_address(name)))


def _addresses(values: list[str]) -> tuple[str, ...]:
    for value in values:
        if not _is_address(value):
            raise ConfigError(f"--trusted-proxy: expected an address such as 127.0.0.1, found {value!r}")
    return tuple(values)


def _is_address(value: str) -> bool:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return False
    return True


def read_keys(path: Path) -> tuple[str, ...]:
    """The API keys of a file, one per line.

    Raises:
        ConfigError: it cannot be read, or has none.
    """
    try:
        keys = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path}: expected a readable text file, found {error}") from None
    if not keys:
        raise ConfigError(f"--api-key-file {path}: expected one key per line, found none")
    return keys
