"""Serves the small model for conversations in a process of its own: `python -m tests.serve.small_server PORT`."""

from __future__ import annotations

import sys
import threading

from omni_jax.serve.app import make_server
from omni_jax.serve.binding import bind
from omni_jax.serve.malloc import limit_heap_growth
from omni_jax.serve.sessions import Service, Settings
from tests.models import quick_compile
from tests.serve.conftest import conversation_omni


def main() -> None:
    limit_heap_growth()
    with quick_compile(), bind("127.0.0.1", int(sys.argv[1])) as sockets:
        service = Service(conversation_omni(), "small", Settings(max_batch_size=8, max_queue_size=64))

        def tell() -> None:
            service.engine.warmed_up.wait()
            print("warmed up", flush=True)

        threading.Thread(target=tell, daemon=True).start()
        make_server(service).run(sockets)


if __name__ == "__main__":
    main()
