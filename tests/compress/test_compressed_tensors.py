"""INT4 and FP8 in the form of compressed-tensors: read back by us, by its own library, and by Transformers with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_requests import make_request, silent
from test_stream_equality import load

from tiny import save_checkpoint
from trtbuild.compress.compressed_tensors import pack_words
from trtbuild.compress.run import run
from trtbuild.errors import CompatibilityError, ToolError
from trtbuild.runtime.checkpoint import load_model
from trtbuild.runtime.codes import unpack_int4
from trtbuild.runtime.compressed_tensors import to_row_pairs

INT4 = {"format": "int4_awq", "group_size": 32}
OTHER = {"checkpoint": "compressed-tensors"}
TOKENS = torch.arange(24)[None] + 5


def logits(directory: Path) -> torch.Tensor:
    loaded = load_model(
        directory, device=torch.device("cpu"), dtype=torch.float32, weights="expanded", attn_implementation="sdpa"
    )
    return loaded.model(input_ids=TOKENS).logits


@pytest.fixture(scope="module")
def every_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in which each query head has values of its own: every smoothing scale finds a place."""
    return save_checkpoint(tmp_path_factory.mktemp("heads") / "llama", overrides={"num_key_value_heads": 4})


def test_words_hold_eight_codes_each() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(4, 1)
    words = pack_words(codes)
    assert words.shape == (4, 2)
    assert [int(words[0, 0]) >> shift & 15 for shift in range(0, 32, 4)] == list(range(8))
    assert torch.equal(unpack_int4(to_row_pairs(words)), codes)


def test_the_same_model_where_all_scales_fold(every_head: Path, tmp_path: Path) -> None:
    """Folding is exact: what differs is that group scales are held in bf16."""
    run(make_request(every_head, tmp_path / "modelopt", **INT4), silent)
    result = run(make_request(every_head, tmp_path / "other", **INT4, **OTHER), silent)
    assert result["notes"] == []
    ours, theirs = logits(tmp_path / "other"), logits(tmp_path / "modelopt")
    assert float((ours - theirs).abs().max()) < 0.02 * float(theirs.abs().max())
    first, second = load(tmp_path / "modelopt"), load(tmp_path / "other")
    for name in [name for name in first if name.endswith("_proj.weight")]:
        assert torch.equal(to_row_pairs(second[f"{name}_packed"]), first[name]), name
    up, down = "model.layers.0.mlp.up_proj.weight_scale", "model.layers.0.mlp.down_proj.pre_quant_scale"
    assert torch.equal(second[up], (first[up] * first[down].float()[:, None]).to(torch.bfloat16))
    assert not any(name.endswith("pre_quant_scale") for name in second)


def test_layers_without_a_place_for_their_scales(compress: Any) -> None:
    """Values that several heads share take up no scale of one of them: such a layer is rounded without smoothing."""
    directory, result = compress("qwen2", **INT4, **OTHER)
    assert len(result["notes"]) == 1
    assert result["notes"][0].startswith("3 of 21 layers have no smoothing")
    assert "model.layers.0.self_attn.o_proj" in result["notes"][0]
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"], config["ignore"][:1]) == (
        "compressed-tensors",
        "pack-quantized",
        ["lm_head"],
    )
    assert not (directory / "hf_quant_config.json").exists()


def test_unsmoothed_codes_are_those_of_the_original_weights(compress: Any, sources: Any) -> None:
    directory, _ = compress("qwen2", **INT4, **OTHER)
    weight = load(sources("qwen2"))["model.layers.0.self_attn.o_proj.weight"].float()
    found = load(directory)
    scale = weight.reshape(64, -1, 32).abs().amax(-1) / 7
    assert torch.allclose(found["model.layers.0.self_attn.o_proj.weight_scale"].float(), scale, rtol=2**-7)
    codes = unpack_int4(to_row_pairs(found["model.layers.0.self_attn.o_proj.weight_packed"]))
    expected = (weight.reshape(64, -1, 32) / scale[..., None]).round().reshape(64, -1)
    assert float((codes != expected).float().mean()) < 0.01  # ties, after smoothing was undone


def test_experts(compress: Any) -> None:
    """The router reads the same norm as the experts, whose gate and up stay without smoothing; down folds into up."""
    directory, result = compress("mixtral", **INT4, **OTHER)
    assert result["notes"][0].startswith("27 of 48 layers have no smoothing")
    assert torch.isfinite(logits(directory)).all()


def test_gptq_has_no_smoothing_to_lose(compress: Any) -> None:
    gptq = INT4 | {"format": "int4_gptq"}
    directory, result = compress("qwen2", **gptq, **OTHER)
    assert result["notes"] == []
    ours, theirs = load(directory), load(compress("qwen2", **gptq)[0])
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(unpack_int4(to_row_pairs(ours[f"{name}.weight_packed"])), unpack_int4(theirs[f"{name}.weight"]))
    assert torch.equal(ours[f"{name}.weight_scale"], theirs[f"{name}.weight_scale"].to(torch.bfloat16))


def test_pruned(sources: Any, tmp_path: Path) -> None:
    request = make_request(
        sources("qwen2"), tmp_path / "out", **INT4, **OTHER, sparsity="2:4", sparsity_method="magnitude"
    )
    assert run(request, silent)["sparsity"]["share"] == 1.0


def test_formats_side_by_side(sources: Any, tmp_path: Path) -> None:
    changes = INT4 | OTHER | {"format": "fp8", "overrides": [["*.mlp.*", "int4_awq"]]}
    run(make_request(sources("qwen3"), tmp_path / "other", **changes), silent)
    run(make_request(sources("qwen3"), tmp_path / "modelopt", **changes | {"checkpoint": "modelopt"}), silent)
    config = json.loads((tmp_path / "other" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert {group["format"] for group in config["config_groups"].values()} == {"pack-quantized", "float-quantized"}
    ours, theirs = logits(tmp_path / "other"), logits(tmp_path / "modelopt")
    # Group scales in bf16 move some activations to the next FP8 code.
    assert float((ours - theirs).abs().mean()) < 0.02 * float(theirs.abs().mean())


def test_damage(compress: Any, tmp_path: Path) -> None:
    import shutil

    directory, _ = compress("qwen2", **INT4, **OTHER)
    damaged = Path(shutil.copytree(directory, tmp_path / "damaged"))
    config = json.loads((damaged / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 8
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CompatibilityError, match="compressed-tensors with weights .*'num_bits': 8.* is not computed here"
    ):
        logits(damaged)


def test_the_files_are_checked(compress: Any, sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trtbuild.compress import layer_export

    monkeypatch.setattr(layer_export.folding, "unsmooth", lambda *args: [])  # leaves o_proj with a smoothing scale
    with pytest.raises(ToolError, match=r"self_attn.o_proj.pre_quant_scale.*: no part of a compressed-tensors"):
        run(make_request(sources("qwen2"), tmp_path / "out", **INT4, **OTHER), silent)


@pytest.mark.parametrize("changes", [INT4, {"format": "fp8"}], ids=["int4", "fp8"])
def test_transformers_with_the_library(changes: dict[str, Any], compress: Any) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (the extra dev has it)")
    import transformers

    directory, _ = compress("qwen2", **changes, **OTHER)
    config = transformers.CompressedTensorsConfig(run_compressed=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=config, dtype=torch.float32
    )
    theirs, ours = model(input_ids=TOKENS).logits, logits(directory)
    assert torch.allclose(theirs, ours, rtol=1e-4, atol=1e-4)


def test_the_library_unpacks_ours(compress: Any) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (the extra dev has it)")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    tensors = load(compress("qwen2", **INT4, **OTHER)[0])
    packed = tensors["model.layers.1.mlp.down_proj.weight_packed"]
    shape = torch.Size(tensors["model.layers.1.mlp.down_proj.weight_shape"].tolist())
    assert torch.equal(unpack_from_int32(packed, 4, shape), unpack_int4(to_row_pairs(packed)))
