"""Checkpoints straight from ModelOpt's two exporters, on a tiny model and in the same quantization."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch

CONFIGS = {
    "FP8": "FP8_DEFAULT_CFG", "W4A16_AWQ": "INT4_AWQ_CFG", "W4A8_AWQ": "W4A8_AWQ_BETA_CFG",
    "W8A8_SQ_PER_CHANNEL": "INT8_SMOOTHQUANT_CFG", "NVFP4": "NVFP4_DEFAULT_CFG",
}  # fmt: skip
DECODERS = {
    "llama": "llama", "llama-tied": "llama", "llama-bias": "llama", "mistral": "llama", "qwen2": "qwen",
    "qwen3": "qwen", "gemma2": "gemma2", "gemma3": "gemma3", "phi3": "phi3",
}  # fmt: skip
GROUP = 64


def quantized_model(source: Path, algo: str, kv_cache: str | None = None) -> Any:
    """The model in `source` with ModelOpt's quantizers, calibrated on random tokens, in bf16."""
    import modelopt.torch.quantization as mtq
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.config.rope_theta = (getattr(model.config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
    tokens = torch.randint(3, 320, (4, 32), generator=torch.Generator().manual_seed(7))
    config: dict[str, Any] = {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": "max"}
    if algo == "MIXED_PRECISION":
        config["quant_cfg"] = [*config["quant_cfg"], *_mixed(mtq)]
    elif algo != "bf16":
        config = copy.deepcopy(getattr(mtq, CONFIGS[algo]))
        _set_group(config["quant_cfg"])
    if kv_cache:
        bits: Any = (4, 3) if kv_cache == "FP8" else 8
        cache = {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": bits, "axis": None}, "enable": True}
        config["quant_cfg"] = [*config["quant_cfg"], cache]
    if algo != "bf16" or kv_cache:

        def forward(quantizing: Any) -> None:
            with torch.no_grad():
                for row in tokens:
                    quantizing(row[None])

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = mtq.quantize(model, config, forward)
    return model.to(torch.bfloat16)


def _mixed(mtq: Any) -> list[dict[str, Any]]:
    """FP8 in the attention, NVFP4 in the MLP."""
    made = []
    for preset, where in ((mtq.FP8_DEFAULT_CFG, "self_attn"), (mtq.NVFP4_DEFAULT_CFG, "mlp")):
        made += [
            entry | {"quantizer_name": f"*{where}{entry['quantizer_name']}"}
            for entry in copy.deepcopy(preset["quant_cfg"])
            if entry.get("quantizer_name") in {"*weight_quantizer", "*input_quantizer"}
        ]
    assert len(made) == 4
    return made


def _set_group(entry: Any) -> None:
    """Groups of 64 instead of 128, in whatever depth of the config they stand."""
    if isinstance(entry, list):
        for item in entry:
            _set_group(item)
    elif isinstance(entry, dict):
        sizes = entry.get("block_sizes")
        if isinstance(sizes, dict) and sizes.get(-1) == 128:
            sizes[-1] = GROUP
        for item in entry.values():
            _set_group(item)


def unified(source: Path, output: Path, algo: str, kv_cache: str | None = None) -> Path:
    """ModelOpt's unified export."""
    from modelopt.torch.export import export_hf_checkpoint

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_hf_checkpoint(quantized_model(source, algo, kv_cache), export_dir=output)
    return output


def engine_checkpoint(
    name: str, source: Path, output: Path, algo: str, tp: int, pp: int, kv_cache: str | None = None
) -> Path:
    """ModelOpt's TensorRT-LLM export."""
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_tensorrt_llm_checkpoint(
            quantized_model(source, algo, kv_cache), DECODERS[name], torch.bfloat16, output,
            inference_tensor_parallel=tp, inference_pipeline_parallel=pp,
        )  # fmt: skip
    return output


def engine_tensors(name: str, source: Path, algo: str, tp: int) -> list[dict[str, torch.Tensor]]:
    """The tensors of ModelOpt's TensorRT-LLM export, by rank, without its config.

    For some architectures it makes a config only where TensorRT-LLM is installed; that function is left out.
    """
    from modelopt.torch.export import model_config_export as exporter

    original = exporter.convert_to_tensorrt_llm_config
    exporter.convert_to_tensorrt_llm_config = lambda config, *_, **__: {"rank": config.rank}
    try:
        made = exporter.torch_to_tensorrt_llm_checkpoint(
            quantized_model(source, algo), DECODERS[name], torch.bfloat16, inference_tensor_parallel=tp
        )
        by_rank = {
            config["rank"]: {key: value.clone() for key, value in weights.items()} for config, weights, _ in made
        }
    finally:
        exporter.convert_to_tensorrt_llm_config = original
    return [by_rank[rank] for rank in range(tp)]
