"""What compares Espalier with others, guards against regressions, and shows it at work."""
