"""The engine: built, verified, and described by a manifest."""
