"""From a LoRA adapter as PEFT saves it to the two arrays that TensorRT-LLM's C++ runtime takes.

``model.lora_weights.npy`` [rows, width]: a row for each adapted module of a layer, A [rank, inputs] and after it
B [outputs, rank], both row by row, B times PEFT's scale, zeros up to the width of the longest row.
``model.lora_config.npy``, int32 [rows, 3]: the module's number, the layer, the rank. Source: NVIDIA/TensorRT-LLM
docs/source/advanced/lora.md @05316d33 ("LoRA tensor format details"); names of the files and their place:
triton-inference-server/tensorrtllm_backend docs/lora.md @05ceae03. A request that brings the arrays itself gives them a
batch dimension in front.

PEFT's form: ``adapter_config.json``, and A and B as ``....layers.N.<module>.lora_A.weight`` in
``adapter_model.safetensors``; the scale is ``lora_alpha`` over the rank, or over its root with ``use_rslora``
(huggingface/peft, src/peft/tuners/lora/layer.py, update_layer).
"""
