"""State of the process: captured CUDA steps, precision, memory, progress, streams and signals."""
