"""Run the benchmarks named on the command line, or all of them."""

from __future__ import annotations

import importlib
import sys

NAMES = (
    "codec",
    "decode",
    "answer",
    "conversation",
    "first_audio",
    "live",
    "realtime",
    "sessions",
    "serve",
    "start",
    "attacks",
    "load",
    "prepare",
    "pipeline",
    "train",
    "formats",
)

if __name__ == "__main__":
    chosen = sys.argv[1:] or NAMES
    unknown = set(chosen) - set(NAMES)
    if unknown:
        sys.exit(f"benchmarks: expected some of {', '.join(NAMES)}, found {', '.join(sorted(unknown))}")
    for name in chosen:
        print(f"\n== {name}", flush=True)
        importlib.import_module(f"benchmarks.{name}").main()
