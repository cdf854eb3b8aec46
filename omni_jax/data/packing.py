"""Packs examples into rows, and stacks rows into batches.

Letters: B rows, T positions of a row, A speech positions of a recording of the greatest length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from omni_jax.config.run import DataConfig
from omni_jax.data.examples import TASKS, ExampleBuilder
from omni_jax.vocab import NUM_STREAMS

Batch = dict[str, np.ndarray]

NUM_BINS = 64
"""Rows packed at the same time. More bins waste fewer positions, but a resumed run packs as many rows again before
its first batch."""


def pack(examples: grain.IterDataset, config: DataConfig, *, seed: int | None) -> grain.IterDataset:
    """Pack examples into rows.

    Args:
        examples: as `ExampleBuilder.build` makes them.
        config: length and number of recordings of a row.
        seed: shuffles the rows that are packed at the same time; None keeps the order of packing.
    """
    return grain.experimental.BestFitPackIterDataset(
        examples,
        # The length of `clip` is the number of recordings, whatever their lengths: the packer does not copy audio.
        length_struct={
            **dict.fromkeys(("tokens", "targets", "mask", "speech_frame"), config.max_length),
            "clip": config.max_clips,
        },
        num_packing_bins=NUM_BINS,
        seed=seed or 0,
        shuffle_bins=seed is not None,
        meta_features=("task", "sound", "skipped", "unreadable"),
    )


def stack_rows(packed: Sequence[dict[str, Any]], *, builder: ExampleBuilder, rows: slice, shared: bool) -> Batch:
    """Stack some of the packed rows to a batch, as `omni_jax.data.pipeline.Batches` describes it.

    Args:
        packed: rows from `pack`.
        builder: knows the shapes.
        rows: which of the rows to stack. Those beyond the last one are padding.
        shared: whether to put audio into shared memory, for another process to read.

    Returns:
        The batch, and in it the counts of all packed rows: int64 `skipped` [reasons] and `unreadable` [n, 2].
    """
    batch = _empty_batch(builder, rows.stop - rows.start, shared)
    for index, row in enumerate(packed[rows]):
        _fill_row(batch, index, row, builder)
    return batch | {
        "skipped": np.sum([skipped for row in packed for skipped in row["skipped"]], axis=0),
        "unreadable": np.concatenate([records for row in packed for records in row["unreadable"]]),
    }


def padding(batch: Batch) -> float:
    """The fraction of a batch's positions that belong to no example."""
    return float(np.mean(batch["segments"] == 0))


def _empty_batch(builder: ExampleBuilder, B: int, shared: bool) -> Batch:
    """A batch of padding."""
    # Audio is most of a batch, and most of it zeros: pages that are never written cost no time. In a worker, it is
    # allocated where the training process reads it.
    zeros = grain.multiprocessing.SharedMemoryArray if shared else np.zeros
    pads, T = builder.vocab.padding[:, None], builder.data.max_length
    return {
        "tokens": np.tile(pads, (B, 1, T)),
        "targets": np.tile(pads, (B, 1, T)),
        "mask": np.zeros((B, NUM_STREAMS, T), bool),
        "positions": np.zeros((B, T), np.int32),
        "segments": np.zeros((B, T), np.int32),
        "speech_index": np.full((B, T), -1, np.int32),
        builder.sound_name: zeros((B, builder.data.max_clips, *builder.sound_shape), builder.sound_dtype),
        "clips": np.zeros(B, np.int32),
        "examples": np.zeros((B, len(TASKS)), np.int32),
    }


def _fill_row(batch: Batch, index: int, row: dict[str, Any], builder: ExampleBuilder) -> None:
    """Write a packed row into a row of a batch."""
    segments = row["tokens_segment_ids"]
    used = segments > 0
    for name in ("tokens", "targets", "mask"):
        np.copyto(batch[name][index], row[name].T, where=used)
    batch["positions"][index] = row["tokens_positions"]
    batch["segments"][index] = segments
    # The recordings of a row are in the order of its examples; examples of text tasks have none.
    segment_of_clip = row["clip_segment_ids"]
    clips = np.flatnonzero(segment_of_clip)
    clip_of_segment = np.zeros(segments.max(initial=0) + 1, np.int32)
    clip_of_segment[segment_of_clip[clips]] = clips
    speech = used & (row["speech_frame"] >= 0)
    first = clip_of_segment[segments[speech]] * builder.max_speech_positions
    batch["speech_index"][index, speech] = first + row["speech_frame"][speech]
    recordings = [audio for audio in row["sound"] if len(audio)]
    for clip, audio in enumerate(recordings):
        batch[builder.sound_name][index, clip, : len(audio)] = audio
    batch["clips"][index] = len(recordings)
    batch["examples"][index] = np.bincount([task for task in row["task"] if task >= 0], minlength=len(TASKS))
