"""There since mid-2026 (NVIDIA/TensorRT-LLM, this path @2341856e)."""
