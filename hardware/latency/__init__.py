"""Latency tables: what layers take on this device, measured in whole networks."""
