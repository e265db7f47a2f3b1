"""Black boxes in this process: torch modules, functions, ONNX files."""
