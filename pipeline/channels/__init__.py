"""Which channels of a network go together: label propagation on its ONNX graph."""
