"""Widths for a target: candidates, an exact choice, and the loop that measures it."""
