"""The delivery: ONNX and TensorRT artefacts, judged in task units before they ship."""
