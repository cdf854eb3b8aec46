"""Prepares a corpus as an Apache Beam pipeline: each part of it is an element, whatever cluster runs it.

Needs `pip install 'omni-jax[beam]'`. Corpus and records are files: every worker must see both folders at the same
path, on a shared or mounted file system. Shards and notes are those that one process would have written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from omni_jax.data import prepare
from omni_jax.data.sources import Source


class WriteUnit(beam.DoFn):
    """Writes the shard and the note of each unit."""

    def __init__(self, source: Source, folder: Path, codec: prepare.Codec | None):
        self.source = source
        self.folder = folder
        self.codec = codec

    def setup(self) -> None:
        """Load the codec, once in a worker."""
        self.encode = self.codec.encoder() if self.codec is not None else None

    def process(self, element: prepare.Job) -> None:
        """A unit, its number and its mark."""
        number, unit, mark = element
        prepare.write_unit(self.source, unit, self.folder, number, mark, self.codec, self.encode)


def run(
    source: Source,
    folder: Path,
    jobs: Sequence[prepare.Job],
    codec: prepare.Codec | None,
    options: Sequence[str],
) -> None:
    """Run the pipeline to its end.

    Args:
        source: the corpus.
        folder: of the records.
        jobs: parts to read.
        codec: see `omni_jax.data.prepare.prepare`.
        options: Beam's, as on a command line; without a runner it is the direct one, in this process.
    """
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        # Without the shuffle a runner may leave all parts to the worker that made the list.
        parts: Any = pipeline | beam.Create(list(jobs)) | beam.Reshuffle()
        _ = parts | beam.ParDo(WriteUnit(source, folder, codec))
