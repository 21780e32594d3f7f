"""Older model repositories, written from upstream's names: every parameter of its templates, and how each is declared.

Facts from config.pbtxt of the five models, read at
- 0.17: triton-inference-server/tensorrtllm_backend, tag v0.17.0 (368eea9b), all_models/inflight_batcher_llm/
- 0.19: the same path at tag v0.19.0 (c1e1963)
- 1.0: enclosed by files with the same parameters: NVIDIA/TensorRT-LLM @2a9abd95, triton_backend/all_models/
  inflight_batcher_llm/ (before 1.0.0, the parameters of v0.19.0), and Ataraksia/TensorRT-LLM @a451bf93, the same
  folder, which merges upstream's main at 1.1.0rc6. Tag v1.0.0 (@ae8270b7) is not among the stored versions
- 1.2: what 1.1.0rc6 and 1.3.0rc3 enclose; the latter is nctu6/vllm-tensorrt @5978a465, third_party/tensorrt_llm/, whose
  version.py says 1.3.0rc3. It has one parameter more, enable_trt_overlap, which is a comment in 1.1.0rc6; @0c8de69a
  has it too, and 1.2 is written with it. Not among the stored versions: 1.2.0rc7 (@a65b0d4e), 1.2.0 (@dbdb13b) and
  1.2.1 (@376f7e1)
- newest: NVIDIA/TensorRT-LLM @0c8de69a (tensorrt_llm), @08dc37e3 (preprocessing), @89fd9b74, @0193dbd4
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

# Parameters of `tensorrt_llm` at v0.17.0 under the names of the file, with values that are not the defaults.
_ENGINE_017 = {
    "max_beam_width": "4",
    "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
    "gpt_model_type": "inflight_fused_batching",
    "gpt_model_path": "/engines/target",
    "encoder_model_path": "/engines/encoder",
    "max_tokens_in_paged_kv_cache": "40960",
    "max_attention_window_size": "4096,1024",
    "sink_token_length": "4",
    "batch_scheduler_policy": "max_utilization",
    "kv_cache_free_gpu_mem_fraction": "0.8",
    "cross_kv_cache_fraction": "0.4",
    "kv_cache_host_memory_bytes": "1000000000",
    "kv_cache_onboard_blocks": "false",
    "exclude_input_in_output": "true",
    "cancellation_check_period_ms": "200",
    "stats_check_period_ms": "300",
    "iter_stats_max_iterations": "77",
    "request_stats_max_iterations": "78",
    "enable_kv_cache_reuse": "False",
    "normalize_log_probs": "false",
    "enable_chunked_context": "true",
    "gpu_device_ids": "0,1",
    "participant_ids": "1,2",
    "lora_cache_optimal_adapter_size": "16",
    "lora_cache_max_adapter_size": "32",
    "lora_cache_gpu_memory_fraction": "0.1",
    "lora_cache_host_memory_bytes": "2000000000",
    "decoding_mode": "medusa",
    "executor_worker_path": "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker",
    "medusa_choices": "{0, 0}, {0, 1}",
    "eagle_choices": "{0}, {1}",
    "gpu_weights_percent": "0.5",
    "enable_context_fmha_fp32_acc": "true",
    "multi_block_mode": "false",
    "cuda_graph_mode": "true",
    "cuda_graph_cache_size": "10",
    "speculative_decoding_fast_logits": "true",
}
_LATER = {
    "num_nodes": "2",
    "lora_prefetch_dir": "/lora",
    "lookahead_window_size": "7",
    "lookahead_ngram_size": "7",
    "lookahead_verification_set_size": "7",
    "tokenizer_dir": "/tokenizer",
    "guided_decoding_backend": "xgrammar",
    "xgrammar_tokenizer_info_path": "/xgrammar.json",
}
_PRE = {
    "tokenizer_dir": "/tokenizer",
    "add_special_tokens": "false",
    "gpt_model_path": "/engines/target",
    "max_num_images": "2",
}
_POST = {"tokenizer_dir": "/tokenizer", "skip_special_tokens": "false"}
_BLS = {
    "accumulate_tokens": "true",
    "tensorrt_llm_model_name": "tensorrt_llm",
    "tensorrt_llm_draft_model_name": "tensorrt_llm_draft",
    "multimodal_encoders_name": "multimodal_encoders",
}
PARAMETERS: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "0.17": {
        "tensorrt_llm": _ENGINE_017,
        "preprocessing": _PRE | {"visual_model_path": "/visual"},
        "postprocessing": _POST,
        "ensemble": {},
        "tensorrt_llm_bls": _BLS,
    },
    "0.19": {
        "tensorrt_llm": _ENGINE_017 | _LATER,
        "preprocessing": _PRE | {"multimodal_model_path": "/visual"},
        "postprocessing": _POST,
        "ensemble": {},
        "tensorrt_llm_bls": _BLS,
    },
    "1.0": {
        "tensorrt_llm": _ENGINE_017 | _LATER,
        "preprocessing": _PRE | {"multimodal_model_path": "/visual"},
        "postprocessing": _POST,
        "ensemble": {},
        "tensorrt_llm_bls": _BLS,
    },
    "1.2": {
        "tensorrt_llm": _ENGINE_017 | _LATER | {"enable_trt_overlap": "true"},
        "preprocessing": _PRE | {"multimodal_model_path": "/visual"},
        "postprocessing": _POST,
        "ensemble": {},
        "tensorrt_llm_bls": _BLS,
    },
    "newest": {
        "tensorrt_llm": _ENGINE_017 | _LATER | {"enable_trt_overlap": "true"},
        "preprocessing": _PRE | {"multimodal_model_path": "/visual", "hf_model_path": "/hf"},
        "postprocessing": _POST,
        "ensemble": {},
        "tensorrt_llm_bls": _BLS,
    },
}
# Parameter keys whose placeholder has another name.
PLACEHOLDERS = {
    "gpt_model_path": "engine_dir",
    "encoder_model_path": "encoder_engine_dir",
    "gpt_model_type": "batching_strategy",
}
STRUCTURE = {
    "triton_backend": "tensorrtllm",
    "triton_max_batch_size": "64",
    "decoupled_mode": "True",
    "max_queue_delay_microseconds": "1000",
    "max_queue_size": "5",
    "logits_datatype": "TYPE_FP16",
    "encoder_input_features_data_type": "TYPE_BF16",
    "prompt_embedding_table_data_type": "TYPE_BF16",
    "preprocessing_instance_count": "2",
    "postprocessing_instance_count": "3",
    "bls_instance_count": "4",
}
_TENSORS = {
    "context_logits": "logits_datatype",
    "encoder_input_features": "encoder_input_features_data_type",
    "prompt_embedding_table": "prompt_embedding_table_data_type",
}


def write_repository(
    out: Path,
    version: str,
    *,
    structure: Mapping[str, str] = STRUCTURE,
    changes: Mapping[str, str] | None = None,
    only: frozenset[str] | None = None,
) -> Path:
    """The five models as fill_template leaves them; a name that is not given stays a placeholder.

    Args:
        out: the repository to make.
        version: a key of `PARAMETERS`.
        structure: values of the placeholders outside of parameters.
        changes: other values of parameters.
        only: the parameters to fill; all by default.
    """
    for model, parameters in PARAMETERS[version].items():
        lines = _structure(model, structure)
        for key, value in parameters.items():
            filled = (changes or {}).get(key, value)
            if only is not None and key not in only and not value.startswith("/opt"):
                filled = "${" + PLACEHOLDERS.get(key, key) + "}"
            lines.append(f'parameters: {{ key: "{key}" value: {{ string_value: "{filled}" }} }}')
        (out / model / "1").mkdir(parents=True)
        (out / model / "config.pbtxt").write_text("\n".join(lines) + "\n")
    return out


def _structure(model: str, structure: Mapping[str, str]) -> list[str]:
    def of(name: str) -> str:
        return structure.get(name, "${" + name + "}")

    batch = of("triton_max_batch_size")
    lines = [f'name: "{model}"', f"max_batch_size: {batch}"]
    if model == "ensemble":
        return [*lines, 'platform: "ensemble"']
    decoupled = f"model_transaction_policy {{ decoupled: {of('decoupled_mode')} }}"
    if model != "tensorrt_llm":
        kind = model.removeprefix("tensorrt_llm_")
        lines += ['backend: "python"', f"instance_group [ {{ count: {of(f'{kind}_instance_count')} kind: KIND_CPU }} ]"]
        return lines + ([decoupled] if model == "tensorrt_llm_bls" else [])
    tensors = [
        f'{{ name: "{name}" data_type: {of(placeholder)} dims: [ -1, -1 ] }}' for name, placeholder in _TENSORS.items()
    ]
    return [
        *lines,
        f'backend: "{of("triton_backend")}"',
        decoupled,
        "dynamic_batching {",
        f"  preferred_batch_size: [ {batch} ]",
        f"  max_queue_delay_microseconds: {of('max_queue_delay_microseconds')}",
        f"  default_queue_policy: {{ max_queue_size: {of('max_queue_size')} }}",
        "}",
        f"input [ {tensors[1]}, {tensors[2]} ]",
        f"output [ {tensors[0]} ]",
        "instance_group [ { count: 1 kind: KIND_CPU } ]",
    ]


ENGINE_CONFIG = {
    "version": "0.17.0",
    "pretrained_config": {
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "hidden_size": 4096,
        "rotary_base": 500000.0,
        "moe": {"num_experts": 0},
        "mapping": {
            "world_size": 4,
            "gpus_per_node": 8,
            "tp_size": 2,
            "pp_size": 2,
            "cp_size": 1,
            "moe_tp_size": 2,
            "moe_ep_size": 1,
        },
        "quantization": {
            "quant_algo": "FP8",
            "kv_cache_quant_algo": "FP8",
            "group_size": 128,
            "smoothquant_val": 0.5,
            "clamp_val": None,
            "use_meta_recipe": False,
            "has_zero_point": False,
            "pre_quant_scale": False,
            "exclude_modules": ["lm_head"],
        },
    },
    "build_config": {
        "max_input_len": 3000,
        "max_seq_len": 4096,
        "opt_batch_size": 8,
        "max_batch_size": 128,
        "max_beam_width": 1,
        "max_num_tokens": 8192,
        "opt_num_tokens": None,
        "max_prompt_embedding_table_size": 0,
        "kv_cache_type": "PAGED",
        "gather_context_logits": False,
        "gather_generation_logits": True,
        "strongly_typed": True,
        "force_num_profiles": None,
        "profiling_verbosity": "layer_names_only",
        "enable_debug_output": False,
        "max_draft_len": 63,
        "speculative_decoding_mode": 4,
        "use_refit": False,
        "input_timing_cache": None,
        "output_timing_cache": "model.cache",
        "lora_config": {
            "lora_dir": [],
            "lora_ckpt_source": "hf",
            "max_lora_rank": 16,
            "lora_target_modules": ["attn_q", "attn_v"],
            "trtllm_modules_to_hf_modules": {"attn_q": "q_proj"},
        },
        "auto_parallel_config": {"world_size": 1, "gpus_per_node": 8, "cluster_key": None},
        "weight_sparsity": True,
        "weight_streaming": False,
        "plugin_config": {"dtype": "bfloat16", "gemm_plugin": "fp8", "tokens_per_block": 64, "paged_kv_cache": True},
        "use_strip_plan": False,
        "max_encoder_input_len": 1024,
        "monitor_memory": False,
        "use_mrope": False,
    },
}
