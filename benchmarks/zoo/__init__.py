"""The channel analysis on many networks, with proof: see `python -m benchmarks.zoo --help`."""
