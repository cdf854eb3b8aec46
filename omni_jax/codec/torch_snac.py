"""The torch SNAC behind a host callback: the published decoder itself, inside jitted JAX programs.

Chosen by name where the reference's own arithmetic is wanted; `omni_jax.codec.snac` is faster. torch is
imported when the codec is made, not before.
"""

from __future__ import annotations

import functools
import threading
import warnings
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from omni_jax.codec.snac import FRAME_SLOTS, block_noise

Array = jax.Array


def import_snac() -> ModuleType:
    """The `snac` package.

    Raises:
        ImportError: it or torch is not installed; says how to install both.
    """
    try:
        with warnings.catch_warnings():
            # snac compiles its Snake with torch.jit.script, which newer torch calls deprecated.
            warnings.simplefilter("ignore", DeprecationWarning)
            import snac
    except ImportError as error:
        raise ImportError(f"the torch codec needs PyTorch and snac: pip install omni-jax[torch] ({error})") from None
    return snac


class TorchSnac:
    """Decodes with torch; `decode` is a `DecodeFn`, under `jax.jit` and `jax.vmap` too.

    Its noise blocks are silent unless a key is given, so the same codes give the same audio.
    """

    def __init__(self, module: Any):
        """Take a `snac.SNAC`, which stays as it is: its weights are copied."""
        from omni_jax.convert.snac import config_of_module, from_torch, to_torch_module

        self.config = config_of_module(module)
        state = {name: tensor.detach().cpu().numpy() for name, tensor in module.state_dict().items()}
        own = to_torch_module(self.config, from_torch(state, self.config))
        self._module, self._noise_blocks = _fold(own, import_snac())
        # A call's noise is handed over through the module, so calls take turns.
        self._lock = threading.Lock()

    def decode(
        self,
        codes: ArrayLike,
        *,
        lengths: ArrayLike | None = None,
        noise_key: Array | None = None,
        first_frame: ArrayLike = 0,
    ) -> Array:
        """Codes to audio, as `omni_jax.codec.snac.Snac.decode`; row after row, each on its own.

        Args:
            codes: int32 [B, F, 7] in slot order.
            lengths: int32 [B], frames of each row that are real.
            noise_key: one key or one per row [B]; the noise is that of the JAX codec.
            first_frame: int32 [] or [B], the absolute frame at which `codes` start, for the noise.

        Returns:
            f32 [B, F*2048]; 0 beyond a row's length.

        Raises:
            ValueError: `noise_key` for a codec without noise blocks.
        """
        codes = jnp.asarray(codes)
        B, F, _ = codes.shape
        lengths = jnp.full((B,), F) if lengths is None else lengths
        noise = []
        if noise_key is not None:
            if not self.config.noise:
                raise ValueError("noise_key: this codec has no noise blocks (config: noise is false)")
            noise = block_noise(self.config, noise_key, first_frame, B, F)
        result = jax.ShapeDtypeStruct((B, F * self.config.frame_size), jnp.float32)
        return jax.pure_callback(
            self._decode_rows, result, codes, jnp.asarray(lengths), *noise, vmap_method="broadcast_all"
        )

    def _decode_rows(self, *operands: Any) -> np.ndarray:
        # Runs on a thread of the JAX runtime, which waits for it: if this called JAX, both could wait
        # forever.
        codes, lengths, *noise = (np.asarray(operand) for operand in operands)
        *rows, F, _ = codes.shape
        audio = np.zeros((*rows, F * self.config.frame_size), np.float32)
        for row in np.ndindex(*rows):
            real = int(np.clip(lengths[row], 0, F))
            if real:
                heard = self._decode_row(codes[row][:real], [block[row] for block in noise])
                audio[row][: len(heard)] = heard
        return audio

    def _decode_row(self, codes: np.ndarray, noise: list[np.ndarray]) -> np.ndarray:
        import torch

        F = len(codes)
        books = [torch.from_numpy(codes[:, slots].reshape(1, -1).astype(np.int64)) for slots in FRAME_SLOTS]
        positions = F * self.config.vq_strides[0]
        with self._lock, torch.inference_mode():
            for index, block in enumerate(self._noise_blocks):
                positions *= self.config.decoder_rates[index]
                block.given = torch.from_numpy(noise[index][:positions].copy()) if noise else None
            return self._module.decode(books)[0, 0].numpy()


def _fold(module: Any, snac: ModuleType) -> tuple[Any, list[Any]]:
    """The codec with the weight norm folded, once instead of per call, and its noise in our hands."""
    from torch.nn.utils import parametrize

    noise_blocks = []
    for part in list(module.modules()):
        if parametrize.is_parametrized(part, "weight"):
            # Not on a copy of a module: copies share the class that this takes `weight` from.
            parametrize.remove_parametrizations(part, "weight")
        if isinstance(part, snac.layers.NoiseBlock):
            part.given = None
            part.forward = functools.partial(_add_given_noise, part)
            noise_blocks.append(part)
    return module, noise_blocks


def _add_given_noise(block: Any, x: Any) -> Any:
    """What a noise block does, with noise that is given instead of drawn, or none."""
    return x if block.given is None else x + block.given * block.linear(x)
