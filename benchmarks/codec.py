"""SNAC in JAX against the torch one, on this machine: `python -m benchmarks.codec`.

The shape is that of snac_24khz with random weights, equal in both. The two take turns in one process and the
medians are compared, so that what else the machine does falls on both. torch runs with its default threads, in
inference mode; `torch` is snac as published, `folded` the same with its weight norm folded beforehand.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from torch.nn.utils import parametrize

from omni_jax.codec.snac import FRAME_SLOTS, Snac, make_decoder, make_encoder
from omni_jax.codec.stream import StreamDecoder
from omni_jax.codec.torch_snac import import_snac
from omni_jax.config.model import CodecConfig
from omni_jax.convert.snac import config_to_json, from_torch

CONFIG = CodecConfig()
ROUNDS = 5
ROWS = 8
"""Of a batch, as `prepare` encodes it."""


def reference() -> Any:
    torch.manual_seed(0)
    return import_snac().SNAC(**config_to_json(CONFIG)).eval()


def folded(module: Any) -> Any:
    for part in list(module.modules()):
        if parametrize.is_parametrized(part, "weight"):
            parametrize.remove_parametrizations(part, "weight")
    return module


def milliseconds(*contestants: Callable[[], Any]) -> list[float]:
    """Median time of each, taking turns; the first round, which compiles, is not counted."""
    times: list[list[float]] = [[] for _ in contestants]
    for turn in range(ROUNDS + 1):
        for contestant, taken in zip(contestants, times, strict=True):
            start = time.perf_counter()
            contestant()
            if turn:
                taken.append(1000 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]


def main() -> None:
    theirs, theirs_folded = reference(), folded(reference())
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    codec = Snac.from_params(CONFIG, from_torch(state, CONFIG))
    decode, encode = make_decoder(codec), make_encoder(codec)
    random = np.random.default_rng(0)

    print(f"{jax.devices()[0].device_kind}, torch threads {torch.get_num_threads()}, medians of {ROUNDS} in ms")
    print(f"{'':26}{'jax':>8}{'torch':>8}{'folded':>8}{'torch/jax':>11}{'folded/jax':>12}")

    def row(name: str, ours: Callable[[], Any], their: Callable[[Any], Any]) -> list[float]:
        def run(module: Any) -> None:
            with torch.inference_mode():
                their(module)

        taken = milliseconds(ours, lambda: run(theirs), lambda: run(theirs_folded))
        jax_ms, torch_ms, folded_ms = taken
        ratios = f"{torch_ms / jax_ms:>10.2f}x{folded_ms / jax_ms:>11.2f}x"
        print(f"{name:26}{jax_ms:8.1f}{torch_ms:8.1f}{folded_ms:8.1f}{ratios}", flush=True)
        return taken

    five_seconds = round(5 * CONFIG.sample_rate / CONFIG.frame_size)
    for name, frames in (("decode 5 s", five_seconds), ("decode a 4-frame chunk", 4)):
        codes = random.integers(0, CONFIG.codebook_size, (1, frames, 7)).astype(np.int32)
        books = [torch.from_numpy(codes[..., slots].reshape(1, -1).astype(np.int64)) for slots in FRAME_SLOTS]
        row(
            name,
            lambda codes=codes: np.asarray(decode(codes)),
            lambda module, books=books: module.decode(books),
        )
    audio = random.standard_normal((1, five_seconds * CONFIG.frame_size)).astype(np.float32) / 4
    tensor = torch.from_numpy(audio[:, None])
    row("encode 5 s", lambda: np.asarray(encode(audio)), lambda module: module.encode(tensor))

    many = np.tile(audio, (ROWS, 1))
    many_tensor = torch.from_numpy(many[:, None])
    taken = row(f"encode {ROWS} x 5 s", lambda: np.asarray(encode(many)), lambda module: module.encode(many_tensor))
    speech = 1000 * many.size / CONFIG.sample_rate
    print(f"{'  s of speech a second':26}" + "".join(f"{speech / each:8.1f}" for each in taken))

    # What a listener waits for: each step decodes the new frames and the context that makes them exact.
    codes = random.integers(0, CONFIG.codebook_size, (80, 7)).astype(np.int32)
    stream = StreamDecoder(decode, CONFIG)
    stream.warm_up()
    times = []
    for at in range(0, len(codes), 4):
        start = time.perf_counter()
        stream.push(codes[at : at + 4])
        times.append(1000 * (time.perf_counter() - start))
    sound = 4000 * CONFIG.frame_size / CONFIG.sample_rate
    print(f"streaming, 4 frames a step: {statistics.median(times):.1f} ms for {sound:.0f} ms of sound")


if __name__ == "__main__":
    main()
