"""Networks: loaded, exported to ONNX, analysed and stored."""
