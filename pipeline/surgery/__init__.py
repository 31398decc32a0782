"""Channels removed from a network, and the proof that nothing else changed."""
