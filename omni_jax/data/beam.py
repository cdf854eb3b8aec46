"""Runs `omni_jax.data.prepare` as an Apache Beam pipeline whose elements are the shards of the source.

Needs `pip install 'omni-jax[beam]'`. Source and records are files: every worker must see both folders at the same
path, on a shared or mounted file system. The files that workers write are identical to those of a single process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from omni_jax.data.shards import Job, ShardWriter


class WriteShard(beam.DoFn):
    """Writes the record shard, and its manifest, of each shard of the source."""

    def __init__(self, writer: ShardWriter):
        self.writer = writer

    def process(self, element: Job) -> None:
        """Write one shard."""
        self.writer.write(*element)


def run(writer: ShardWriter, jobs: Sequence[Job], options: Sequence[str]) -> None:
    """Run the pipeline and wait for its end.

    Args:
        writer: pickled and sent to the workers.
        jobs: shards to write.
        options: pipeline options of Beam, as on a command line. Without `--runner`, it runs in this process.
    """
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        # Without the shuffle, a runner may leave all shards to the worker that created the list.
        shards: Any = pipeline | beam.Create(list(jobs)) | beam.Reshuffle()
        _ = shards | beam.ParDo(WriteShard(writer))
