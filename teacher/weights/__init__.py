"""The shipped mini teacher's weights (safetensors)."""
