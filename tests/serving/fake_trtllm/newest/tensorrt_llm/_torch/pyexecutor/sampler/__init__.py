"""A package since 2026 (NVIDIA/TensorRT-LLM tensorrt_llm/_torch/pyexecutor/sampler/ @32e0e21a)."""
