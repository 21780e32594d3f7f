"""The sampler is one file in 1.2 (NVIDIA/TensorRT-LLM tensorrt_llm/_torch/pyexecutor/sampler.py @28edbcdb)."""
