"""There since mid-2026 (NVIDIA/TensorRT-LLM, this path @0a1f13c0)."""
