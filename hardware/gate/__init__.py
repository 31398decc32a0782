"""The regression gate: did an engine get slower?"""
