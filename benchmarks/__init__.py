"""Speed, as ratios measured side by side in one run: `python -m benchmarks [decode|answer|codec|load]`."""
