"""Manage the state that belongs to the whole process rather than to an object.

Each module says which state it keeps: captured CUDA steps, float32 precision, output memory,
progress bars, standard streams, signals, and requests to stop.
"""
