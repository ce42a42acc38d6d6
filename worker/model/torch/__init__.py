"""What needs the extra ``torch``: models on a GPU, and architectures that the ONNX graph does not cover."""
