"""Speed as ratios measured side by side: `python -m benchmarks [codec|decode|answer|...]`; see docs/benchmarks.md."""
