"""Serve models in this process as black boxes: torch modules, functions, ONNX files."""
