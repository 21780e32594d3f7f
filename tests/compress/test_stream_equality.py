"""Layer by layer gives what ModelOpt gives for the whole model in memory, bit for bit.

The reference calls ModelOpt alone: `mtq.quantize` and `export_hf_checkpoint` on the model with separate experts. Every
sum is taken in the same order in both, so there is no bound to state: equal means equal bits. SparseGPT alone is ours
on both sides; `test_solvers.py` holds it against the paper.
"""

from __future__ import annotations

import copy
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_requests import CALIBRATION, make_request, silent
from safetensors.torch import load_file

from tiny import save_checkpoint
from trtbuild.compress.request import parse_request
from trtbuild.compress.run import run
from trtbuild.compress.selection import select
from trtbuild.compress.source import load_source, read_tensors
from trtbuild.compress.sparsify import sparsify_by_hessians
from trtbuild.compress.textdata import CalibrationSpec, load_samples
from trtbuild.compress.whole import parts

ARCHITECTURES = ("llama-tied", "qwen3", "gemma2", "gemma3", "mixtral", "qwen3_moe")
COMBINATIONS: list[dict[str, Any]] = [
    {"format": "fp8"},
    {"format": "fp8", "kv_cache": "fp8", "sparsity": "2:4"},
    {"format": "int4_awq", "group_size": 32},
    {"format": "int4_awq", "group_size": 16, "kv_cache": "fp8", "sparsity": "2:4", "sparsity_method": "magnitude"},
    {"kv_cache": "fp8"},
]


def names_of(changes: dict[str, Any]) -> str:
    return "+".join(map(str, changes.values())) or "bf16"


def load(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def modelopt_config(changes: dict[str, Any]) -> dict[str, Any]:
    import modelopt.torch.quantization as mtq

    named = {
        "fp8": mtq.FP8_DEFAULT_CFG, "int4_awq": mtq.INT4_AWQ_CFG, "w4a8_awq": mtq.W4A8_AWQ_BETA_CFG,
        "fp8_per_channel_per_token": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG, "int8_sq": mtq.INT8_SMOOTHQUANT_CFG,
        "fp8_block": mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG, "int8_weight_only": mtq.INT8_WEIGHT_ONLY_CFG,
        "nvfp4": mtq.NVFP4_DEFAULT_CFG, "w4a16_nvfp4": mtq.W4A16_NVFP4_CFG, "mxfp4": mtq.MXFP4_DEFAULT_CFG,
        "mxfp8": mtq.MXFP8_DEFAULT_CFG, "int4_gptq": mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG,
    }  # fmt: skip
    config: dict[str, Any] = copy.deepcopy(
        named.get(changes.get("format", "none"))
        or {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": "max"}
    )
    if changes.get("format") == "int4_gptq":
        config["algorithm"] = {"method": "gptq", "layerwise": {"enable": True}}
    for entry in config["quant_cfg"] if "group_size" in changes else []:
        settings = entry.get("cfg") or {}
        for part in settings if isinstance(settings, list) else [settings]:
            if "block_sizes" in part:
                part["block_sizes"][-1] = changes["group_size"]
    caches = {"fp8": mtq.FP8_KV_CFG, "nvfp4": mtq.NVFP4_KV_CFG}
    if "kv_cache" in changes:
        config["algorithm"] = config["algorithm"] or "max"
        config["quant_cfg"] = [*config["quant_cfg"], *copy.deepcopy(caches[changes["kv_cache"]]["quant_cfg"])]
    return config


def in_memory(source: Path, output: Path, changes: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    """Compress with ModelOpt alone, the whole model at once."""
    import modelopt.torch.quantization as mtq
    import modelopt.torch.sparsity as mts
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.export import unified_export_hf as exporter

    # ModelOpt 0.47 does not know the experts of most classes when it exports AWQ, and gives an INT4 expert's gate and
    # up the larger of both scales, group by group, which no reader of INT4 asks for; with W4A8 it fails.
    if changes.get("format") in ("int4_awq", "int4_gptq", "w4a8_awq"):
        patch.setattr(exporter, "sync_moe_gate_up_amax", lambda model: 0)
    patch.setattr(
        exporter,
        "get_experts_list",
        lambda block, kind: [
            [getattr(expert, name) for expert in block.experts] for name in ("gate_proj", "down_proj", "up_proj")
        ],
    )
    model = load_source(parse_request(make_request(source, output)), torch.device("cpu"))
    samples = load_samples(CalibrationSpec(**CALIBRATION), source).input_ids  # type: ignore[arg-type]

    def loop(model: Any) -> None:
        with torch.no_grad():
            for sample in samples:
                model(input_ids=torch.tensor([sample]), use_cache=False)

    if "sparsity_method" in changes:
        rules = {"nn.Linear": {"*": {}, "*lm_head*": None}}
        mts.sparsify(model, [("sparse_magnitude", rules)], config={"verbose": False, "forward_loop": loop})
        mts.export(model)
    elif "sparsity" in changes:
        selection = select(model, read_tensors(source), parse_request(make_request(source, output, **changes)))
        sparsify_by_hessians(model, selection, loop, parts(model, selection))
    mtq.quantize(model, modelopt_config(changes), loop)
    export_hf_checkpoint(model, dtype=torch.float32, export_dir=output)


@pytest.mark.parametrize("changes", COMBINATIONS, ids=names_of)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_as_in_memory(
    name: str, changes: dict[str, Any], sources: Any, compress: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, result = compress(name, **changes)
    assert result["notes"] == []  # not held in memory as a whole, no expert without tokens
    in_memory(sources(name), tmp_path / "memory", changes, monkeypatch)
    check_equal(directory, tmp_path / "memory")


OTHERS: list[tuple[str, dict[str, Any]]] = [
    *(("qwen3", {"format": name}) for name in (
        "fp8_per_channel_per_token", "int8_sq", "int8_weight_only", "nvfp4", "w4a16_nvfp4", "mxfp4", "mxfp8",
    )),
    *(("qwen3_moe", {"format": name}) for name in ("fp8_per_channel_per_token", "int8_sq", "nvfp4", "mxfp8")),
    ("gemma3", {"format": "nvfp4", "kv_cache": "fp8", "sparsity": "2:4"}),
    ("mixtral", {"format": "mxfp4", "kv_cache": "fp8"}),
    ("qwen3", {"format": "nvfp4", "kv_cache": "nvfp4"}),
    ("mixtral", {"format": "int8_weight_only", "sparsity": "2:4"}),
    ("qwen3", {"format": "w4a8_awq", "group_size": 32, "kv_cache": "fp8"}),
    ("mixtral", {"format": "w4a8_awq", "group_size": 64}),
    ("qwen3", {"format": "int4_gptq", "group_size": 32, "kv_cache": "fp8"}),
    ("gemma2", {"format": "int4_gptq", "group_size": 16}),
    ("mixtral", {"format": "int4_gptq", "group_size": 32}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes"), OTHERS, ids=[f"{name}-{names_of(changes)}" for name, changes in OTHERS])
def test_other_formats(
    name: str, changes: dict[str, Any], sources: Any, compress: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, result = compress(name, **changes)
    assert result["notes"] == []
    assert result["sparsity"] is None or result["sparsity"]["share"] == 1.0
    assert (result["calibration"] is None) == (changes["format"] in DATA_FREE and len(changes) == 1)
    in_memory(sources(name), tmp_path / "memory", changes, monkeypatch)
    check_equal(directory, tmp_path / "memory", gptq=changes["format"] == "int4_gptq")


DATA_FREE = ("fp8_per_channel_per_token", "fp8_block", "int8_weight_only", "w4a16_nvfp4", "mxfp4", "mxfp8")


def test_blocks_of_128_and_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Formats of the weights alone never open the calibration text."""
    from trtbuild.compress import textdata

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("no text is needed")

    sides = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
    source = save_checkpoint(tmp_path / "source", "qwen3", overrides=sides)
    with monkeypatch.context() as patch:
        patch.setattr(textdata, "load_samples", refuse)
        for name in DATA_FREE:
            result = run(make_request(source, tmp_path / name, format=name), silent)
            assert (result["quantized_projections"], result["calibration"]) == (21, None)
    in_memory(source, tmp_path / "memory", {"format": "fp8_block"}, monkeypatch)
    check_equal(tmp_path / "fp8_block", tmp_path / "memory")


def check_equal(directory: Path, memory: Path, *, gptq: bool = False) -> None:
    """Every tensor and both configs of a streamed checkpoint are those of one made in memory."""
    streamed, expected = load(directory), load(memory)
    if gptq:  # ones, without which TensorRT-LLM does not load layers that are joined to no other
        added = streamed.keys() - expected.keys()
        assert {name.rpartition(".")[0].rpartition(".")[2] for name in added} <= {"o_proj", "down_proj"}
        assert all(bool((streamed.pop(name) == 1).all()) for name in added)
    assert streamed.keys() == expected.keys()
    for tensor_name, tensor in expected.items():
        coded = (".weight_scale", ".weight_scale_2", ".input_scale", ".k_scale", ".v_scale")
        uncoded = tensor.dtype == torch.float32 and not tensor_name.endswith(coded)
        wanted = tensor.to(torch.bfloat16) if uncoded else tensor  # what is not coded is rounded on its way out
        found = streamed[tensor_name]
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), tensor_name
        assert torch.equal(bits(found), bits(wanted)), tensor_name
    for file in ("hf_quant_config.json", "config.json"):
        ours, theirs = (json.loads((path / file).read_text()) for path in (directory, memory))
        if file == "config.json":
            ours, theirs = ours["quantization_config"], theirs["quantization_config"]
        assert without_lists(ours) == without_lists(theirs)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def without_lists(config: dict[str, Any]) -> dict[str, Any]:
    """A config less the lists of modules, which ours has module by module, and what only ours has."""
    section = dict(config.get("quantization", config))
    kept = {
        key: value for key, value in section.items() if key not in ("exclude_modules", "ignore", "quantized_layers")
    }
    kept.pop("has_zero_point", None)
    return {key: value for key, value in kept.items() if value is not None}


@pytest.mark.parametrize("form", ["fp8", "int8_weight_only"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_excluded_modules(
    name: str, form: str, sources: Any, compress: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both lists name the same modules. ModelOpt sums names up with wildcards; ours also has each one as it is."""
    directory, _ = compress(name, format=form, exclude=["model.layers.1.*"])
    config = modelopt_config({"format": form})
    config["quant_cfg"] = [*config["quant_cfg"], {"quantizer_name": "*layers.1.*", "enable": False}]
    monkeypatch.setitem(globals(), "modelopt_config", lambda changes: config)
    in_memory(sources(name), tmp_path / "memory", {"format": form}, monkeypatch)
    ours, theirs = (
        json.loads((path / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
        for path in (directory, tmp_path / "memory")
    )
    tensors = load(directory)
    matrices = {key.removesuffix(".weight") for key, tensor in tensors.items() if tensor.dim() == 2}
    alone = {module for module in matrices if tensors[f"{module}.weight"].dtype == torch.bfloat16}
    assert set(theirs) <= set(ours)
    assert set(ours) - set(theirs) == alone - set(theirs)
    assert named(ours, matrices) == alone
    assert named(theirs, matrices) == alone


def named(patterns: list[str], modules: set[str]) -> set[str]:
    return {module for module in modules if any(fnmatchcase(module, pattern) for pattern in patterns)}


def test_many_files_hold_the_same_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of odd sizes are split where a tensor would not begin at a multiple of its type's size."""
    from trtbuild.compress import shards, stream

    source = save_checkpoint(tmp_path / "source", "mixtral", overrides={"vocab_size": 321}, max_shard_size="90KB")
    request = make_request(source, tmp_path / "one", format="fp8")
    run(request, silent)
    whole = load(tmp_path / "one")
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors")] == ["model.safetensors"]

    class Small(shards.ShardWriter):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs, limit=60_000)

    monkeypatch.setattr(stream, "ShardWriter", Small)
    run(request | {"output": str(tmp_path / "many")}, silent)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert files[-1].name == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    parts = load(tmp_path / "many")
    assert index["weight_map"] == {name: path.name for path in files for name in load_file(path)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in parts.values())
    assert parts.keys() == whole.keys()
    assert all(torch.equal(bits(parts[name]), bits(whole[name])) for name in whole)
    for path in files:
        for name, tensor in load_file(path).items():
            assert tensor.data_ptr() % tensor.element_size() == 0, name


def test_a_model_that_cannot_be_streamed_is_held_in_memory_and_says_so(tmp_path: Path) -> None:
    """OPT's smallest model has projections beside its decoder layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tiny import save_tokenizer

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "opt", vocab_size=320, hidden_size=64, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, bos_token_id=0, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    result = run(make_request(tmp_path / "source", tmp_path / "out", format="fp8"), silent)
    assert result["quantized_projections"] == 2 * 6 + 2
    assert result["notes"] == [
        "the whole model was held in memory: model.decoder.project_out lies outside the decoder layers"
    ]


def test_an_int8_cache_has_the_ranges_of_an_fp8_cache(compress: Any) -> None:
    """ModelOpt's exporter refuses it, so the largest magnitudes are compared: 127 scales of INT8, 448 of FP8."""
    int8, fp8 = (compress("qwen3", format="int8_sq", kv_cache=name)[0] for name in ("int8", "fp8"))
    found, wanted = load(int8), load(fp8)
    assert found.keys() == wanted.keys()
    names = [name for name in found if name.endswith((".k_scale", ".v_scale"))]
    assert len(names) == 6
    for name in names:
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name] * 127, wanted[name] * 448)
    nested = json.loads((int8 / "hf_quant_config.json").read_text())["quantization"]
    assert (nested["quant_algo"], nested["kv_cache_quant_algo"]) == ("W8A8_SQ_PER_CHANNEL", "INT8")
