"""Every architecture, format and division: what is read back from the rank files is what the checkpoint holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deconvert import bits, deconvert, read_safetensors
from matrix import CELLS, FORMATS, Cell, markdown, refused
from safetensors.torch import load_file
from synthetic import plain, quantized

from trtbuild.convert.experts import interleave
from trtbuild.convert.plan import Output, RankPlan
from trtbuild.convert.run import run
from trtbuild.errors import CompatibilityError

SCALES = {
    "weight_scale": "weights_scaling_factor", "weight_scale_2": "weights_scaling_factor_2",
    "input_scale": "activation_scaling_factor", "pre_quant_scale": "prequant_scaling_factor",
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The checkpoint of a model in a format, made once."""
    made: dict[tuple[str, ...], Path] = {}

    def get(name: str, column: str) -> Path:
        algo, kv_cache, _ = FORMATS[column]
        for key, make in (
            ((name,), lambda path: plain(path, name)),
            ((name, algo, str(kv_cache)), lambda path: quantized(made[name,], path, algo, kv_cache)),
        ):
            if key not in made:
                made[key] = make(tmp_path_factory.mktemp("source") / "checkpoint")
        return made[name, algo, str(kv_cache)]

    return get


def silent(done: int, total: int, what: str) -> None:
    assert 0 <= done <= total
    assert what


def convert(source: Path, output: Path, tp: int, pp: int, dtype: str = "auto") -> dict[str, Any]:
    request = {"source": str(source), "output": str(output), "tp_size": tp, "pp_size": pp, "dtype": dtype}
    return run(request, silent)


def expected_tensors(source: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors as the description of the format wants them, in unified names."""
    stored = load_file(source / "model.safetensors")
    if config["architecture"] == "Phi3ForCausalLM":
        stored = _unfused(stored, config)
    wanted = {}
    for name, tensor in stored.items():
        prefix, _, key = name.rpartition(".")
        if key in ("k_scale", "v_scale"):
            scales = [stored[f"{prefix[:-6]}{letter}_proj.{letter}_scale"] for letter in "kv"]
            wanted[f"{prefix.removesuffix('self_attn.' + prefix[-6:])}kv_scale"] = max(scales).reshape(1)
        elif ".experts." in prefix and key != "weight" and config["quantization"]["quant_algo"] == "NVFP4":
            wanted |= _fp4_expert(stored, prefix, key)
        elif key in ("weight_scale", "weight_scale_2", "input_scale"):
            wanted[f"{prefix}.{SCALES[key]}"] = _together(stored, prefix, key).reshape(tensor.shape or (1,))
        elif key == "pre_quant_scale":
            wanted[f"{prefix}.{SCALES[key]}"] = tensor
        elif tensor.dtype == torch.float8_e4m3fn and tensor.dim() == 2 and key == "weight":
            scale, common = stored[f"{prefix}.weight_scale"], _together(stored, prefix, "weight_scale")
            wanted[name] = (tensor.float() * scale / common).to(torch.float8_e4m3fn)
        elif config["architecture"].startswith("Gemma") and "norm" in name:
            wanted[name] = (tensor.float() + 1).to(tensor.dtype)
        elif name.endswith(("block_sparse_moe.gate.weight", "mlp.gate.weight")):
            wanted[name] = tensor.float()
        else:
            wanted[name] = tensor
    wanted.setdefault("lm_head.weight", stored["model.embed_tokens.weight"])
    return wanted


def _fp4_expert(stored: dict[str, torch.Tensor], prefix: str, key: str) -> dict[str, torch.Tensor]:
    """The scales of an expert in NVFP4 as the engine's layer has them: it multiplies both numbers beforehand."""
    if key == "weight_scale":
        return {f"{prefix}.weights_block_scaling_factor": stored[f"{prefix}.{key}"]}
    largest = _together(stored, prefix, "input_scale")
    if key == "input_scale":
        return {f"{prefix}.activation_global_scaling_factor": largest.reshape(1)}
    return {f"{prefix}.alpha": stored[f"{prefix}.weight_scale_2"] * largest}


def _unfused(stored: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Phi-3's fused projections taken apart; what has no rows of its own goes to each part."""
    query = config["num_attention_heads"] * config["head_size"]
    kv = config["num_key_value_heads"] * config["head_size"]
    fused = {
        "self_attn.qkv_proj": {"self_attn.q_proj": query, "self_attn.k_proj": kv, "self_attn.v_proj": kv},
        "mlp.gate_up_proj": {"mlp.gate_proj": config["intermediate_size"], "mlp.up_proj": config["intermediate_size"]},
    }
    made = {}
    for name, tensor in stored.items():
        parts = next((parts for prefix, parts in fused.items() if f"{prefix}." in name), None)
        if parts is None:
            made[name] = tensor
            continue
        prefix = next(prefix for prefix in fused if f"{prefix}." in name)
        begin, whole = 0, sum(parts.values())
        for part, rows in parts.items():
            divided = tensor.dim() > 0 and not name.endswith("pre_quant_scale")
            unit = whole // tensor.shape[0] if divided else 1
            own = tensor[begin // unit : (begin + rows) // unit] if divided else tensor
            made[name.replace(prefix, part)] = own
            begin += rows
    return made


def _together(stored: dict[str, torch.Tensor], prefix: str, key: str) -> torch.Tensor:
    """The largest of a scalar scale over what is one layer in the engine; experts share the scale of their input."""
    own = stored[f"{prefix}.{key}"]
    if own.numel() > 1:
        return own
    stem, _, last = prefix.rpartition(".")
    expert = ".experts." in prefix
    names = [last]
    fused = [("q_proj", "k_proj", "v_proj")]
    fused += [("gate_proj", "up_proj"), ("w1", "w3")] if "expert" in prefix else []
    for group in fused:
        names = list(group) if last in group else names
    stems = [stem]
    if expert and key == "input_scale":
        head = stem.rpartition(".")[0]
        stems = sorted({name.rpartition(".")[0].rpartition(".")[0] for name in stored if name.startswith(f"{head}.")})
    return torch.stack([stored[f"{stem}.{name}.{key}"] for stem in stems for name in names]).max()


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_what_is_read_back_is_what_was_stored(cell: Cell, sources: Any, tmp_path: Path) -> None:
    """Every cell of the matrix: converted and read back, or refused with its sentence and nothing written."""
    name, column, (tp, pp) = cell
    source, output, dtype = sources(name, column), tmp_path / "out", FORMATS[column][2]
    sentence = refused(cell)
    if sentence is not None:
        with pytest.raises(CompatibilityError) as caught:
            convert(source, output, tp, pp, dtype)
        assert sentence in str(caught.value)
        assert not output.exists()
        return
    result = convert(source, output, tp, pp, dtype)
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    wanted, found = expected_tensors(source, config), deconvert(output)
    assert wanted.keys() - found.keys() == set()
    for key, value in wanted.items():
        if dtype == "float16" and value.dtype == torch.bfloat16:
            value = value.half()  # noqa: PLW2901
        assert found[key].dtype == value.dtype or value.dtype == torch.uint8, key
        assert found[key].shape == value.shape, key
        assert bits(found[key]).equal(bits(value)), key
    for key in found.keys() - wanted.keys():  # only factors that the checkpoint does not need
        assert key.endswith("prequant_scaling_factor"), key
        assert bool((found[key] == 1).all()), key
    assert result["files"].keys() == {path.name for path in output.glob("rank*")}
    assert result["bytes"] == sum(path.stat().st_size for path in output.glob("rank*"))
    more = {"quant_cfg.json"} if column == "mixed" else set()
    assert {path.name for path in output.iterdir()} == {*result["files"], "config.json", *more}


def test_the_page_on_engines_shows_the_matrix() -> None:
    page = Path(__file__).parents[2] / "docs" / "runtime-trtllm-engine.md"
    assert markdown() in page.read_text(encoding="utf-8")


def test_tiles_are_those_of_modelopt() -> None:
    """Block scales of NVFP4 experts lie as ModelOpt's exporter of diffusion models lays them for cuBLAS."""
    from modelopt.torch.export.diffusers_utils import swizzle_nvfp4_scales

    scales = torch.randint(0, 256, (384, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    scales[scales & 127 == 127] = 1  # no NaN
    layer = {"weight": torch.zeros(384, 96, dtype=torch.uint8), "weight_scale": scales.view(torch.float8_e4m3fn)}
    state = {f"layer.{name}": tensor for name, tensor in layer.items()} | {"layer.weight_scale_2": torch.ones(())}
    wanted = swizzle_nvfp4_scales(state)["layer.weight_scale"].view(torch.uint8)
    assert not wanted.equal(scales)
    assert np.array_equal(interleave(scales.numpy()), wanted.numpy())


def test_float16_is_rounded_from_the_stored_values(sources: Any, tmp_path: Path) -> None:
    source = sources("llama", "bf16")
    convert(source, tmp_path / "out", 1, 1, "float16")
    stored, found = load_file(source / "model.safetensors"), deconvert(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["dtype"] == "float16"
    assert all(bits(found[name]).equal(bits(tensor.to(torch.float16))) for name, tensor in stored.items())


def test_the_files_open_with_the_reference_reader(sources: Any, tmp_path: Path) -> None:
    convert(sources("qwen3", "NVFP4"), tmp_path / "out", 2, 1)
    for path in sorted((tmp_path / "out").glob("rank*")):
        ours, theirs = read_safetensors(path), load_file(path)
        assert ours.keys() == theirs.keys()
        assert all(bits(ours[name]).equal(bits(theirs[name])) for name in ours)


def test_wide_types_are_aligned_behind_odd_sizes() -> None:
    plan = RankPlan(0, [Output(name="a", dtype="I8", shape=(3,)), Output(name="b", dtype="F32", shape=(2,))])
    _, begins, size = plan.layout()
    assert begins["b"] % 4 == 0
    assert size == max(begins.values()) + 3


def test_blocks_of_any_size_give_the_same_files(sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of more than one block, with pieces that begin and end inside blocks."""
    for name, algo in (("qwen3", "FP8"), ("phi3", "W4A16-AWQ"), ("mixtral", "NVFP4")):
        convert(sources(name, algo), tmp_path / f"{name}-whole", 2, 1)
        monkeypatch.setattr("trtbuild.convert.stream._BLOCK_BYTES", 1000)
        convert(sources(name, algo), tmp_path / f"{name}-blocks", 2, 1)
        monkeypatch.undo()
        for path in (tmp_path / f"{name}-whole").iterdir():
            assert path.read_bytes() == (tmp_path / f"{name}-blocks" / path.name).read_bytes()
