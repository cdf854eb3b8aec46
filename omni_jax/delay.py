"""The delay pattern: text leads, and each codebook's stream starts one step after the stream before it.

    step        0    1    2    3  ...            F+1  ...  F+7
    codebook 0  pad  c0   c0   c0 ...            eoa  pad  pad
    codebook 1  pad  pad  c1   c1 ...                 eoa  pad
    ...
    codebook 6  pad  pad  pad  pad ...  c6 (from step 7)   eoa

F frames take F + 8 steps. Host-side numpy: the scan on the device needs only `NUM_CODEBOOKS` and the step number.
"""

from __future__ import annotations

import numpy as np

from omni_jax.vocab import NUM_CODEBOOKS, Vocab


def delay(codes: np.ndarray, vocab: Vocab) -> np.ndarray:
    """Lay frames out over the steps at which each codebook's stream has them.

    Args:
        codes: int [F, 7], codes of each frame in the order of frame slots.
        vocab: gives the ids of padding and end of audio.

    Returns:
        int32 [7, F + 8]: padding, the codebook's codes, end of audio, padding.
    """
    frames = len(codes)
    out = np.full((NUM_CODEBOOKS, frames + NUM_CODEBOOKS + 1), vocab.pad_a, np.int32)
    for codebook in range(NUM_CODEBOOKS):
        out[codebook, codebook + 1 : codebook + 1 + frames] = codes[:, codebook]
        out[codebook, codebook + 1 + frames] = vocab.eoa
    return out


def undelay(tokens: np.ndarray, vocab: Vocab) -> np.ndarray:
    """Collect the complete frames among the tokens decoded so far.

    The last codebook alone decides how many there are: its steps before its end of audio, if it has one yet.

    Args:
        tokens: int [7, steps], the audio streams as decoded.
        vocab: gives the id of end of audio.

    Returns:
        int32 [F, 7], tokens as they are: a model may output a special where a code belongs, see `fill_invalid_codes`.
    """
    last = tokens[NUM_CODEBOOKS - 1, NUM_CODEBOOKS:]
    ends = np.flatnonzero(last == vocab.eoa)
    frames = int(ends[0]) if len(ends) else len(last)
    return np.stack([tokens[k, k + 1 : k + 1 + frames] for k in range(NUM_CODEBOOKS)], axis=1).astype(np.int32)


def fill_invalid_codes(frames: np.ndarray, vocab: Vocab) -> np.ndarray:
    """Replace each token that is not a code by the code before it in its stream (0 if none), so that all frames decode.

    A trained model does not need this. An untrained one does, and one that ends its streams unevenly. It depends on
    earlier frames only, so a stream and a whole answer agree.

    Args:
        frames: int [F, 7] from `undelay`.
        vocab: says which ids are codes.

    Returns:
        int32 [F, 7], all in 0..audio-1.
    """
    valid = frames < vocab.config.audio
    latest = np.maximum.accumulate(np.where(valid, np.arange(len(frames))[:, None], -1), axis=0)
    held = np.take_along_axis(frames, np.maximum(latest, 0), axis=0)
    return np.where(latest >= 0, held, 0).astype(np.int32)
