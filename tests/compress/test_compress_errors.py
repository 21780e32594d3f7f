"""What a wrong request, a damaged source or a full disk ends in: one sentence, the right class, nothing half-done."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_requests import CALIBRATION, make_request, silent
from safetensors.torch import load_file, save_file

from tiny import save_checkpoint
from trtbuild.compress import by_layer, sparsify
from trtbuild.compress.checks import check_export
from trtbuild.compress.compressed_checks import check_compressed
from trtbuild.compress.request import parse_request
from trtbuild.compress.run import run
from trtbuild.compress.selection import select
from trtbuild.compress.skeleton import NotStreamableError
from trtbuild.compress.source import load_source, read_tensors
from trtbuild.errors import ArtifactError, CompatibilityError, RecipeError, ToolError
from trtbuild.runtime.checkpoint_files import weight_files

MODULES = "model.layers.0.self_attn.q_proj"

BAD_REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown format": (
        {"format": "fp4"},
        r"compress.format: 'fp4' is not one of none, fp8, fp8_per_channel_per_token, ",
    ),
    "unknown sparsity": ({"sparsity": "1:4"}, r"compress.sparsity: '1:4' is not one of none, 2:4"),
    "no group": ({"format": "int4_awq"}, r"compress.group_size: int4_awq needs a group size"),
    "group does not divide": (
        {"format": "int4_awq", "group_size": 48},
        r"compress.group_size: 48 does not divide the input size 64, 128 of .*q_proj.* and 18 more; use 64 or 32 or 16",
    ),
    "pattern without a match": (
        {"format": "fp8", "exclude": ["lm_head", "*.self_atn.*"]},
        r"compress.exclude\[1\]: '\*.self_atn.\*' matches no module of this model; names look like ",
    ),
    "pattern that splits q, k, v": (
        {"format": "fp8", "exclude": ["*.q_proj"]},
        r"compress.exclude: model.layers.0.self_attn: only a part of q_proj, k_proj, v_proj is excluded",
    ),
    "everything excluded": ({"format": "fp8", "exclude": ["*"]}, "compress.exclude: leaves no layer to compress"),
    "nothing to exclude from": ({"exclude": ["lm_head"]}, "compress.exclude: has no meaning while nothing"),
    "several at once": (
        {"format": "int4_awq", "group_size": 48, "exclude": ["*.nothing"]},
        r"compress.exclude\[0\].*\n.*compress.group_size: 48 does not divide",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_bad_requests(changes: dict[str, Any], message: str, sources: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        run(make_request(sources("qwen3"), tmp_path / "out", **changes), silent)
    assert not list((tmp_path / "out").glob("*"))


def test_sides_that_2_to_4_cannot_take(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", overrides={"intermediate_size": 120})
    request = make_request(source, tmp_path / "out", sparsity="2:4", sparsity_method="magnitude")
    message = "compress.sparsity: 2:4 by magnitude needs outputs by 8 and inputs by 16: model.layers.0.mlp.down_proj"
    with pytest.raises(RecipeError, match=message):
        run(request, silent)
    result = run(request | {"exclude": ["*.down_proj"]}, silent)
    assert result["sparsity"]["share"] == 1.0


def test_quantized_source(compress: Any, tmp_path: Path) -> None:
    directory, _ = compress("llama-tied", format="int4_awq", group_size=32)
    with pytest.raises(RecipeError, match=r"already quantized \(modelopt, quant_algo W4A16_AWQ, group_size 32\); give"):
        run(make_request(directory, tmp_path / "out", format="fp8"), silent)


@pytest.fixture
def copy(sources: Any, tmp_path: Path) -> Path:
    shutil.copytree(sources("llama-tied"), tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("wanted", ["none", "fp8"])
def test_damaged_sources(wanted: str, copy: Path, tmp_path: Path) -> None:
    request = make_request(copy, tmp_path / "out", format=wanted)
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ArtifactError, match="model.safetensors is truncated: its tensors need"):
        run(request, silent)
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"there are no \*.safetensors files"):
        run(request, silent)
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(CompatibilityError, match=r"pickles \(pytorch_model.bin\)"):
        run(request, silent)


@pytest.mark.parametrize("wanted", ["none", "fp8"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_numbers(value: float, wanted: str, copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors[f"{MODULES}.weight"][3, 5] = value
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=f"{MODULES}.weight holds NaN or infinite values"):
        run(make_request(copy, tmp_path / "out", format=wanted), silent)


def test_source_that_lacks_a_tensor(copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors.pop(f"{MODULES}.weight")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=f"{MODULES}.weight missing from the files"):
        run(make_request(copy, tmp_path / "out", format="fp8"), silent)


def test_type_that_transformers_does_not_know(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    with pytest.raises(ArtifactError, match="nonesuch"):
        run(make_request(copy, tmp_path / "out", format="fp8"), silent)


def test_layers_that_no_calibration_input_reaches(copy: Path, tmp_path: Path) -> None:
    """A norm of zeros makes every input of q, k and v zero: a scale of zero would end in NaN."""
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"].zero_()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ToolError, match=r"layers.1.self_attn.q_proj: its inputs have no usable range"):
        run(make_request(copy, tmp_path / "out", format="fp8"), silent)


def test_source_types_are_rounded_to_bf16(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama-tied", dtype="float32", max_shard_size="40KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    copied, coded = tmp_path / "copied", tmp_path / "coded"
    run(make_request(source, copied), silent)
    run(make_request(source, coded, format="fp8"), silent)
    original = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    written = {name: tensor for path in copied.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], tensor.to(torch.bfloat16)) for name, tensor in original.items())
    index = json.loads((copied / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 2 for tensor in original.values())
    # Codes come from the float32 weights: rounding those to bf16 first would move some to a neighbour.
    codes = load_file(coded / "model.safetensors")
    weight = original[f"{MODULES}.weight"]
    scale = weight.abs().max() / 448
    assert torch.equal(codes[f"{MODULES}.weight"].float(), (weight / scale).to(torch.float8_e4m3fn).float())
    assert json.loads((coded / "config.json").read_text())["dtype"] == "bfloat16"


STRAY = {"layers.0.attention.wq.weight": torch.full((8, 8), float("nan"))}


@pytest.mark.parametrize("changes", [{}, {"format": "fp8"}], ids=["bf16", "fp8"])
@pytest.mark.parametrize("shard_size", ["60KB", "1GB"], ids=["shards", "one file"])
def test_weights_that_are_not_of_the_model_are_left_alone(
    shard_size: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Mistral publishes its weights twice, the second time as consolidated.safetensors with other names."""
    source = save_checkpoint(tmp_path / "source", max_shard_size=shard_size)
    expected = run(make_request(source, tmp_path / "expected", **changes), silent)
    save_file(STRAY, source / "consolidated.safetensors")
    found = run(make_request(source, tmp_path / "out", **changes), silent)
    assert found["tensors"] == expected["tensors"]
    for path in sorted((tmp_path / "expected").iterdir()):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()


def test_weight_files_of_a_directory(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    with pytest.raises(ArtifactError, match=r"no \*.safetensors file"):
        weight_files(tmp_path)
    for name in ("b.safetensors", "a.safetensors"):
        save_file(STRAY, tmp_path / name)
    assert [path.name for path in weight_files(tmp_path)] == ["a.safetensors", "b.safetensors"]
    save_file(STRAY, tmp_path / "model.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    index.write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": "c.safetensors"}}))
    assert [path.name for path in weight_files(tmp_path)] == ["b.safetensors", "c.safetensors"]
    with pytest.raises(ArtifactError, match="c.safetensors is missing, model.safetensors.index.json names it"):
        read_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": ["b.safetensors"]}))
    with pytest.raises(ArtifactError, match="weight_map must map tensor names to file names"):
        weight_files(tmp_path)


SPARSE: list[dict[str, Any]] = [{}, {"format": "fp8"}, {"format": "int4_awq", "group_size": 32}]


@pytest.mark.parametrize("changes", SPARSE, ids=["bf16", "fp8", "int4_awq"])
def test_a_weight_that_is_not_pruned_does_not_ship(
    changes: dict[str, Any], sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune = sparsify.sparsify_by_magnitude

    def spoil(model: Any, *rest: Any) -> None:
        prune(model, *rest)
        if "0" in model.model.layers._modules:  # layers come one by one
            weight = model.get_submodule(MODULES).weight
            weight.data[2, 8:12] = weight.data[2].abs().max()

    monkeypatch.setattr(sparsify, "sparsify_by_magnitude", spoil)
    request = make_request(sources("qwen3"), tmp_path / "out", sparsity="2:4", sparsity_method="magnitude", **changes)
    message = rf"{MODULES}.weight \(1 of 2,048 groups\): not 2:4, only [\d,]+ of [\d,]+ groups have at most two"
    with pytest.raises(ToolError, match=message):
        run(request, silent)


def test_a_model_that_cannot_be_taken_layer_by_layer(sources: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*args: object) -> None:
        raise NotStreamableError("its layers hang together")

    monkeypatch.setattr(by_layer, "compress_by_layer", refuse)
    wishes: list[tuple[dict[str, Any], str]] = [
        ({"checkpoint": "compressed-tensors"}, "compressed-tensors is written layer by layer, which fails here: its"),
        ({"max_memory": 1 << 40}, "compress.max_memory: this model cannot be compressed layer by layer: its layers"),
    ]
    for changes, message in wishes:
        with pytest.raises(CompatibilityError, match=message):
            run(make_request(sources("qwen3"), tmp_path / "refused", format="fp8", **changes), silent)
    source = save_checkpoint(tmp_path / "source", "qwen3_moe", overrides={"num_experts": 16})
    request = make_request(source, tmp_path / "out", format="fp8", calibration=CALIBRATION | {"count": 1, "length": 16})
    whole, idle = run(request, silent)["notes"]
    assert whole == "the whole model was held in memory: its layers hang together"
    assert re.match(r"\d+ experts saw no calibration token: model.layers.0.mlp.experts.\d+, ", idle)


DAMAGE: dict[str, tuple[dict[str, Any], Any, str]] = {
    "codes that are no numbers": (
        {"format": "fp8"},
        lambda tensors: tensors[f"{MODULES}.weight"].view(torch.uint8)[0].fill_(0xFF),
        "q_proj.weight: holds NaN codes",
    ),
    "codes that are no numbers, in the other form": (
        {"format": "fp8", "checkpoint": "compressed-tensors"},
        lambda tensors: tensors[f"{MODULES}.weight"].view(torch.uint8)[0].fill_(0x7F),
        "q_proj.weight: holds NaN codes",
    ),
    "a scale that is gone, in the other form": (
        {"format": "fp8", "checkpoint": "compressed-tensors"},
        lambda tensors: tensors.pop(f"{MODULES}.weight_scale"),
        "q_proj.weight_scale: missing from the export",
    ),
    "a scale of zero": (
        {"format": "fp8"},
        lambda tensors: tensors[f"{MODULES}.weight_scale"].zero_(),
        "q_proj.weight_scale: scales must be positive and finite",
    ),
    "an exponent that is no number": (
        {"format": "mxfp8"},
        lambda tensors: tensors[f"{MODULES}.weight_scale"].fill_(255),
        "q_proj.weight_scale: scales must be finite",
    ),
    "input scales that differ": (
        {"format": "fp8"},
        lambda tensors: tensors[f"{MODULES}.input_scale"].mul_(2),
        "k_proj.input_scale, .*q_proj.input_scale, .*v_proj.input_scale: engines load them as one matrix",
    ),
    "a matrix in bf16": (
        {"format": "fp8"},
        lambda tensors: tensors.update({f"{MODULES}.weight": tensors[f"{MODULES}.weight"].to(torch.bfloat16)}),
        "q_proj: not quantized, although compress.exclude does not name it",
    ),
    "a matrix that nobody knows": (
        {"format": "fp8"},
        lambda tensors: tensors.update({"model.stray.weight": torch.zeros(2, 2)}),
        "model.stray: not quantized, although no exclude pattern names it",
    ),
    "a norm that is gone": (
        {"format": "fp8"},
        lambda tensors: tensors.pop("model.norm.weight"),
        "model.norm.weight: in the source, but not exported",
    ),
    "a scale that is gone": (
        {"format": "fp8"},
        lambda tensors: tensors.pop(f"{MODULES}.input_scale"),
        "q_proj.input_scale: missing from the export",
    ),
    "KV scales that are gone": (
        {"format": "fp8", "kv_cache": "fp8"},
        lambda tensors: tensors.pop("model.layers.0.self_attn.k_proj.k_scale"),
        "ModelOpt's export has 2 k_scale for 3 layers",
    ),
}


@pytest.mark.parametrize(("changes", "damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_export_does_not_ship(
    changes: dict[str, Any], damage: Any, message: str, compress: Any, sources: Any, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(compress("qwen3", **changes)[0], tmp_path / "out"))
    (shard,) = output.glob("*.safetensors")
    tensors = load_file(shard)
    damage(tensors)
    save_file(tensors, shard)
    request = parse_request(make_request(sources("qwen3"), output, **changes))
    source = read_tensors(request.source)
    selection = select(load_source(request, torch.device("cpu")), source, request)
    check = check_compressed if request.checkpoint == "compressed-tensors" else check_export
    with pytest.raises(ToolError, match=message):
        check(request, selection, source)


FULL_DISK = """
    import json, sys
    from pathlib import Path
    from trtbuild.compress.run import run
    from trtbuild.errors import HostError

    request, moment = json.loads(sys.argv[1]), sys.argv[2]
    mount = Path(request["output"]).parent

    def fill(done, total, what):
        if what.startswith(moment):
            with open(mount / "other", "wb", buffering=0) as file:
                try:
                    while file.write(b"x" * 65536):
                        pass
                except OSError:
                    pass

    fill(0, 1, "start")
    try:
        run(request, fill)
    except HostError as error:
        print("HostError:", error)
    (mount / "other").unlink()
    print("Again:", run(request, lambda *_: None)["notes"])
"""


@pytest.mark.parametrize(
    ("changes", "moment", "message"),
    [
        ({"format": "fp8"}, "start", r"needs about \d\d,\d{3},\d{3} bytes, [\d,]+ are free; free space"),
        ({"format": "fp8"}, "write the checkpoint: embeddings", r"bytes, the disk is full; free space"),
        ({"format": "fp8"}, "layer 2 of 3 is done", r"bytes, the disk is full; free space"),
        ({}, "copy: file 1", r"bytes, the disk is full; free space"),
    ],
    ids=["before", "fp8", "layer", "bf16"],
)
def test_full_disk(changes: dict[str, Any], moment: str, message: str, tmp_path: Path) -> None:
    """A real small file system, in a mount namespace of its own, fills up before or while the files are written."""
    mount = tmp_path / "mount"
    mount.mkdir()
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    command = f"mount -t tmpfs -o size=20m none {mount}"
    if shutil.which("unshare") is None or subprocess.run([*namespace, "sh", "-c", command], check=False).returncode:
        pytest.skip("this host lets no user mount a tmpfs in a namespace of his own")
    source = save_checkpoint(tmp_path / "source", max_shard_size="60KB")
    request = json.dumps(make_request(source, mount / "out", **changes))
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(FULL_DISK))
    shell = f'{command} && exec "$0" "$@"'
    done = subprocess.run(
        [*namespace, "sh", "-c", shell, sys.executable, str(script), request, moment],
        capture_output=True, text=True, check=False, timeout=300,
        env={"PYTHONPATH": "builder", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    error = next(line for line in done.stdout.splitlines() if line.startswith("HostError"))
    assert str(mount / "out") in error
    assert re.search(message, error), error
    finished = {
        "layer 2 of 3 is done": ["an earlier run had finished 2 of 3 layers"],
        "copy: file 1": ["files that an earlier run had copied: 1"],
    }
    assert f"Again: {finished.get(moment, [])}" in done.stdout
