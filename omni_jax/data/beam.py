"""Prepares a corpus as an Apache Beam pipeline: each part of it is an element, whatever cluster runs it.

Needs `pip install 'omni-jax[beam]'`. Corpus and records are files: every worker must see both folders at the same
path, on a shared or mounted file system. Shards and notes are those that one process would have written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from omni_jax.data import shards


class Write(beam.DoFn):
    """Writes the shard and the note of each unit."""

    def __init__(self, write: shards.ShardWriter):
        self.write = write

    def process(self, element: shards.Job) -> None:
        """A unit, with its number and its mark."""
        self.write(*element)


def run(write: shards.ShardWriter, jobs: Sequence[shards.Job], options: Sequence[str]) -> None:
    """Run the pipeline to its end.

    Args:
        write: to be sent to the workers.
        jobs: parts to read.
        options: Beam's, as on a command line; without a runner it is the direct one, in this process.
    """
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        # Without the shuffle a runner may leave all parts to the worker that made the list.
        parts: Any = pipeline | beam.Create(list(jobs)) | beam.Reshuffle()
        _ = parts | beam.ParDo(Write(write))
