"""The published torch SNAC behind a host callback, inside jitted JAX programs.

It is there for the reference's own arithmetic; `omni_jax.codec.snac` is faster. torch is imported when the codec is
made, not before.
"""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from omni_jax.codec.snac import FRAME_SLOTS
from omni_jax.config.model import CodecConfig
from omni_jax.errors import MissingExtraError

Array = jax.Array


def import_snac() -> ModuleType:
    """The `snac` package.

    Raises:
        MissingExtraError: snac or torch is not installed.
    """
    try:
        with warnings.catch_warnings():
            # snac compiles its Snake with torch.jit.script, which newer versions of torch deprecate.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            import snac
    except ImportError as error:
        raise MissingExtraError(f"the torch codec needs PyTorch and snac ({error})", "torch") from None
    return snac


class TorchSnac:
    """Decodes with torch; `decode` is a `DecodeFn`, under `jax.jit` and `jax.vmap` too.

    The noise blocks are silenced: decoding adds no noise, so equal codes give equal audio.

    Attributes:
        config: the codec's.
    """

    def __init__(self, module: Any, config: CodecConfig):
        """Take over a torch codec.

        Args:
            module: a `snac.SNAC`, which is changed in place: its weight norm is folded into the weights, and its noise
                blocks do nothing. Pass one that nothing else uses. A `copy.deepcopy` of a module in use does not do:
                removing its weight norm breaks the original, as parametrized copies share a class.
            config: the module's.

        Raises:
            MissingExtraError: torch or snac is not installed.
        """
        self.config = config
        self._module = _prepare(module, import_snac())

    def decode(self, codes: ArrayLike, *, lengths: ArrayLike | None = None) -> Array:
        """Codes to audio, as `omni_jax.codec.snac.Snac.decode`; each row is decoded by itself.

        Args:
            codes: int32 [B, F, 7] in the order of frame slots.
            lengths: int32 [B], frames of each row that are real.

        Returns:
            f32 [B, F*2048]; 0 beyond a row's length.
        """
        codes = jnp.asarray(codes)
        B, F, _ = codes.shape
        lengths = jnp.full((B,), F) if lengths is None else jnp.asarray(lengths)
        result = jax.ShapeDtypeStruct((B, F * self.config.frame_size), jnp.float32)
        return jax.pure_callback(self._decode_rows, result, codes, lengths, vmap_method="broadcast_all")

    def _decode_rows(self, codes: Any, lengths: Any) -> np.ndarray:
        # Runs on a thread of the JAX runtime, which waits for it: a call of JAX from here could deadlock.
        codes, lengths = np.asarray(codes), np.asarray(lengths)
        *rows, F, _ = codes.shape
        audio = np.zeros((*rows, F * self.config.frame_size), np.float32)
        for row in np.ndindex(*rows):
            length = int(np.clip(lengths[row], 0, F))
            if length:
                audio[row][: length * self.config.frame_size] = self._decode_row(codes[row][:length])
        return audio

    def _decode_row(self, codes: np.ndarray) -> np.ndarray:
        """Decode int [F, 7] to f32 [F*2048]."""
        import torch

        books = [torch.from_numpy(codes[:, slots].reshape(1, -1).astype(np.int64)) for slots in FRAME_SLOTS]
        with torch.inference_mode():
            return self._module.decode(books)[0, 0].numpy()


def _prepare(module: Any, snac: ModuleType) -> Any:
    """The module, with its weight norm folded once instead of in every call, and its noise blocks silenced."""
    from torch.nn.utils import parametrize

    module.eval()
    for layer in list(module.modules()):
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight")
        if isinstance(layer, snac.layers.NoiseBlock):
            layer.forward = lambda x: x
    return module
