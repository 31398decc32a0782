"""Do what onnxruntime_perf_test does, in Python: the wheel does not bring the program itself.

python -m benchmarks.ort_perf MODEL SECONDS

One session on one thread, inputs and outputs bound once, one inference to warm up, then inferences
back to back for the given time. Prints the median, ms.
"""

import sys
import time

import numpy as np
import onnxruntime


def bound(path: str) -> tuple[onnxruntime.InferenceSession, onnxruntime.IOBinding]:
    """Return a session on one thread, and the binding of its inputs and outputs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    binding, generator = session.io_binding(), np.random.default_rng(0)
    for value in session.get_inputs():
        feed = generator.standard_normal(value.shape).astype(np.float32)
        binding.bind_ortvalue_input(value.name, onnxruntime.OrtValue.ortvalue_from_numpy(feed))
    for value in session.get_outputs():
        binding.bind_output(value.name, "cpu")
    return session, binding


def main() -> None:
    """Time the model of the command line and print the median, ms."""
    path, seconds = sys.argv[1], float(sys.argv[2])
    session, binding = bound(path)
    session.run_with_iobinding(binding)
    took_ms: list[float] = []
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        start_ns = time.perf_counter_ns()
        session.run_with_iobinding(binding)
        took_ms.append((time.perf_counter_ns() - start_ns) / 1e6)
    print(float(np.median(took_ms)))


if __name__ == "__main__":
    main()
