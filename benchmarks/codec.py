"""SNAC in JAX against SNAC in torch: `python -m benchmarks.codec`.

Both have the shape of snac_24khz and the same random weights. They take turns in one process and the medians are
compared, so that other load on the machine affects both alike. torch runs with its default number of threads, in
inference mode; `torch` is snac as published, `folded` the same with its weight norm folded beforehand.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
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
BATCH_SIZE = 8
"""Recordings that `omni_jax.data.prepare` encodes at once."""


def reference() -> Any:
    torch.manual_seed(0)
    return import_snac().SNAC(**config_to_json(CONFIG)).eval()


def folded(module: Any) -> Any:
    for layer in list(module.modules()):
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight")
    return module


def milliseconds(*functions: Callable[[], Any]) -> list[float]:
    """Median time of each, taking turns; the first round, which compiles, is not counted."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(ROUNDS + 1):
        for function, elapsed in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if turn:
                elapsed.append(1000 * (time.perf_counter() - start))
    return [statistics.median(elapsed) for elapsed in times]


def main() -> None:
    published, published_folded = reference(), folded(reference())
    state = {name: tensor.numpy() for name, tensor in published.state_dict().items()}
    codec = Snac.from_params(CONFIG, from_torch(state, CONFIG))
    decode, encode = make_decoder(codec), make_encoder(codec)
    random = np.random.default_rng(0)

    print(f"{jax.devices()[0].device_kind}, torch threads {torch.get_num_threads()}, medians of {ROUNDS} in ms")
    print(f"{'':26}{'jax':>8}{'torch':>8}{'folded':>8}{'torch/jax':>11}{'folded/jax':>12}")

    def row(name: str, run_jax: Callable[[], Any], run_torch: Callable[[Any], Any]) -> list[float]:
        def run(module: Any) -> None:
            with torch.inference_mode():
                run_torch(module)

        times = milliseconds(run_jax, lambda: run(published), lambda: run(published_folded))
        jax_ms, torch_ms, folded_ms = times
        ratios = f"{torch_ms / jax_ms:>10.2f}x{folded_ms / jax_ms:>11.2f}x"
        print(f"{name:26}{jax_ms:8.1f}{torch_ms:8.1f}{folded_ms:8.1f}{ratios}", flush=True)
        return times

    def decode_jax(codes: np.ndarray) -> np.ndarray:
        return np.asarray(decode(codes))

    def decode_torch(books: list[torch.Tensor], module: Any) -> Any:
        return module.decode(books)

    five_seconds = round(5 * CONFIG.sample_rate / CONFIG.frame_size)
    for name, frames in (("decode 5 s", five_seconds), ("decode a 4-frame chunk", 4)):
        codes = random.integers(0, CONFIG.codebook_size, (1, frames, 7)).astype(np.int32)
        books = [torch.from_numpy(codes[..., slots].reshape(1, -1).astype(np.int64)) for slots in FRAME_SLOTS]
        row(name, partial(decode_jax, codes), partial(decode_torch, books))
    audio = random.standard_normal((1, five_seconds * CONFIG.frame_size)).astype(np.float32) / 4
    tensor = torch.from_numpy(audio[:, None])
    row("encode 5 s", lambda: np.asarray(encode(audio)), lambda module: module.encode(tensor))

    many = np.tile(audio, (BATCH_SIZE, 1))
    many_tensor = torch.from_numpy(many[:, None])
    times = row(
        f"encode {BATCH_SIZE} x 5 s", lambda: np.asarray(encode(many)), lambda module: module.encode(many_tensor)
    )
    speech = 1000 * many.size / CONFIG.sample_rate
    print(f"{'  s of speech per second':26}" + "".join(f"{speech / each:8.1f}" for each in times))

    # The latency of a stream: each step decodes the new frames and the context that makes them exact.
    codes = random.integers(0, CONFIG.codebook_size, (80, 7)).astype(np.int32)
    stream = StreamDecoder(decode, CONFIG)
    stream.warm_up()
    steps = []
    for first in range(0, len(codes), 4):
        start = time.perf_counter()
        stream.push(codes[first : first + 4])
        steps.append(1000 * (time.perf_counter() - start))
    audio_ms = 4000 * CONFIG.frame_size / CONFIG.sample_rate
    print(f"streaming, 4 frames a step: {statistics.median(steps):.1f} ms for {audio_ms:.0f} ms of audio")


if __name__ == "__main__":
    main()
