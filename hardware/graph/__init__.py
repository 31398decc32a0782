"""ONNX graphs: read, simplify, carve, fold, change their batch size or precision."""
