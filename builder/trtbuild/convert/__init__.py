"""From a unified Hugging Face checkpoint to TensorRT-LLM's own, for releases up to 1.2.x (``trtllm-build``).

Run as ``python -m trtbuild.convert``. Input: plain bf16, fp16 or fp32 safetensors, or ModelOpt's unified export.
Output: ``config.json`` and ``rank{i}.safetensors``, i counting tensor-parallel ranks within pipeline stages; for layers
of different formats ``quant_cfg.json`` too. Needs numpy alone: every change of a value is elementwise, so that tensors
stream from file to file; only block scales of NVFP4 experts change places, one expert at a time (`experts`).

Where the projections that TensorRT-LLM fuses carry scales of their own:

- FP8 query, key and value (and gate and up of an expert): the largest scale, codes re-quantized to it.
- KV cache: ``kv_cache_scaling_factor``, the larger of both scales.
- Input scales, second scales and smoothing factors must be equal; a checkpoint where they differ is refused.
- Smoothing that ModelOpt folded into a norm leaves no factor in the file; TensorRT-LLM wants one, so ones are written.

Gemma's norm weights are stored as offsets from 1; the sum is rounded to the checkpoint's type, as upstream does.

What TensorRT-LLM does when it loads the files was read there and cannot be executed here: INT4 codes are transposed
and interleaved for CUTLASS, NVFP4 block scales are padded and interleaved, W4A8's factors are combined
(NVIDIA/TensorRT-LLM, tensorrt_llm/models/modeling_utils.py, preprocess_perlayer_weights @34a267279384), and FP8 gate
and up are brought to one scale where they are fused (fuse_gate_mlp there). The files hold what that code reads.
"""
