"""A Ray Serve application: replicas of `omni-jax serve` behind one address, as many as the requests need.

From a checkout, with `pip install 'ray[serve]>=2.60'` on every node:

    serve run deploy.ray_serve:build model=nano max_replicas=4
    serve run deploy.ray_serve:build model=RELEASE max_replicas=8 num_gpus=1

A replica takes as many requests as it decodes at once. The others wait in Ray's proxy: they make the autoscaler add
replicas, and are not lost with a replica that dies.
"""

# Without postponed annotations: Ray looks up the type of the builder's parameter.

import asyncio
from pathlib import Path
from typing import Any

import pydantic
from pydantic import Field
from ray import serve

from omni_jax.cli import startup
from omni_jax.log import log_to_stderr
from omni_jax.serve.malloc import limit_heap_growth


class Arguments(pydantic.BaseModel, extra="forbid"):
    """What may follow the name of the application, as NAME=VALUE."""

    model: str = "nano"
    int8: bool = False
    tensor: int = Field(default=1, ge=1)
    """Devices that share every row."""
    max_batch_size: int = Field(default=8, ge=1)
    """Requests and conversations of a replica at once."""
    max_queue_size: int = Field(default=64, ge=0)
    """Requests that may wait; more get status 503."""
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=2, ge=1)
    upscale_delay: float = Field(default=30.0, ge=0)
    """Seconds that requests wait before a replica is added."""
    num_cpus: float = 1.0
    """Of a replica, as Ray counts them."""
    num_gpus: float = 0.0
    num_tpus: float = 0.0
    api_key_file: Path | None = None
    """As `omni-jax serve --api-key-file`."""
    allow_host: str = "localhost"
    """Name by which clients reach the proxy; `*`: any."""
    request_timeout: float = Field(default=120.0, ge=1)
    """Seconds after which a request is canceled, and that a replica has to finish its requests before it ends."""


@serve.deployment
@serve.ingress()
class OmniServer:
    """A model behind every endpoint of `omni-jax serve`, WebSockets included."""

    async def __init__(self, arguments: Arguments):  # type: ignore[misc]  # Ray awaits it.
        """Load the model; a replica gets requests once it can answer the first one."""
        startup.enable_compilation_cache()
        startup.silence_libtpu()
        limit_heap_growth()
        log_to_stderr()
        self.service = await asyncio.to_thread(_make_service, arguments)
        await self.service.wait_until_ready()
        self.check_health()

    def __serve_build_asgi_app__(self) -> Any:
        """The application, which Ray closes when the replica ends."""
        from omni_jax.serve.app import make_app

        return make_app(self.service)

    def check_health(self) -> None:
        """Ask Ray for another replica, if only a restart will help."""
        if self.service.state == "broken":
            raise RuntimeError("the model has failed; the log of the replica says why")


def _make_service(arguments: Arguments) -> Any:
    # In the replica alone: the process that starts the application may have no accelerator.
    from omni_jax.cli.loading import load_model, tensor_mesh
    from omni_jax.cli.serve import read_keys
    from omni_jax.serve.sessions import Service, Settings

    settings = Settings(
        max_batch_size=arguments.max_batch_size,
        request_timeout=arguments.request_timeout,
        api_keys=read_keys(arguments.api_key_file) if arguments.api_key_file else (),
        allowed_hosts=(arguments.allow_host.lower(),),
    )
    omni = load_model(arguments.model, int8=arguments.int8, mesh=tensor_mesh(arguments.tensor))
    return Service(omni, Path(arguments.model).name or arguments.model, settings)


def build(arguments: Arguments) -> serve.Application:
    """The application, as `serve run` and `serve build` take it."""
    resources = {"TPU": arguments.num_tpus} if arguments.num_tpus else {}
    deployment = OmniServer.options(  # type: ignore[attr-defined]  # The decorator makes a deployment of the class.
        max_ongoing_requests=arguments.max_batch_size,
        max_queued_requests=arguments.max_queue_size,
        autoscaling_config={
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            # Requests that wait count too: where there are any, there are more than this.
            "target_ongoing_requests": arguments.max_batch_size,
            "upscale_delay_s": arguments.upscale_delay,
        },
        ray_actor_options={"num_cpus": arguments.num_cpus, "num_gpus": arguments.num_gpus, "resources": resources},
        health_check_period_s=10,
        graceful_shutdown_timeout_s=arguments.request_timeout,
    )
    return deployment.bind(arguments)
