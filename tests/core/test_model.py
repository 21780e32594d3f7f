"""Model facts from files alone, and every way in which a checkpoint can be broken."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import save_checkpoint
from trtbuild.checkpoint_files import LocalFiles, open_directory
from trtbuild.errors import ArtifactError, CompatibilityError, RecipeError
from trtbuild.model import ModelFacts, read_facts


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_llama: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "ckpt"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("sharded") / "ckpt", max_shard_size="100KB")


def facts_of(path: Path) -> ModelFacts:
    return read_facts(open_directory(path))


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_facts_of_a_tiny_llama(tiny_llama: Path) -> None:
    facts = facts_of(tiny_llama)
    linear = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    assert facts.architecture == "LlamaForCausalLM"
    assert facts.linear_parameters == linear
    assert facts.parameters == linear + 2 * 320 * 64 + 7 * 64
    assert facts.weight_bytes == 2 * facts.parameters
    assert facts.dtype == "BF16"
    assert (facts.num_layers, facts.num_attention_heads, facts.num_key_value_heads, facts.head_dim) == (3, 4, 2, 16)
    assert facts.kv_bytes_per_token(2) == 2 * 3 * 2 * 16 * 2
    assert facts.linear_input_sizes == (64, 128)
    assert facts.linear_input_examples == (
        "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.down_proj.weight",
    )  # fmt: skip
    assert (facts.context_length, facts.vocab_size, facts.tie_word_embeddings) == (512, 320, False)
    assert facts.has_tokenizer
    assert facts.has_chat_template
    assert facts.quantization is None


def test_sharded_checkpoint_has_the_same_numbers(sharded: Path, tiny_llama: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert facts_of(sharded).parameters == facts_of(tiny_llama).parameters


def test_reading_facts_imports_no_torch(tiny_llama: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from trtbuild.model import read_facts;"
        "from trtbuild.checkpoint_files import open_directory; read_facts(open_directory(Path(sys.argv[1])));"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    root = Path(__file__).parents[2] / "builder"
    subprocess.run([sys.executable, "-c", program, str(tiny_llama)], check=True, env={"PYTHONPATH": str(root)})


def test_missing_empty_and_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model.path: .*nowhere does not exist; give a checkpoint directory"):
        open_directory(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match="is empty; give a directory with config.json"):
        open_directory(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RecipeError, match="file is a file; give"):
        open_directory(tmp_path / "file")


def test_missing_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(sharded, tmp_path / "c"))
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ArtifactError, match=f"{shard.name} is missing, model.safetensors.index.json names it"):
        facts_of(path)


def test_shard_without_its_tensor_is_named(sharded: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(sharded, tmp_path / "c"))
    first, second = sorted(path.glob("*.safetensors"))[:2]
    shutil.copyfile(first, second)
    with pytest.raises(ArtifactError, match=f"{second.name} lacks the tensor"):
        facts_of(path)


def test_truncated_shard_is_named(checkpoint: Path) -> None:
    shard = checkpoint / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"model.safetensors is truncated: its tensors need \d+ bytes, it holds"):
        facts_of(checkpoint)


def rewrite_header(shard: Path, change: object) -> None:
    data = shard.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)  # type: ignore[operator]
    raw = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header[NORM].update(shape=[65]), rf"{NORM} has shape \[65\] of BF16, 130 bytes, but spans 128"),
        (lambda header: header[NORM].update(dtype="F7"), f"{NORM} has the unknown type F7"),
        (lambda header: header[NORM].update(data_offsets=[0, 128]), "the tensors leave a gap or overlap at byte"),
        (lambda header: header[NORM].update(shape=[-64]), f"the header entry of {NORM} is malformed"),
        (lambda header: header[NORM].pop("shape"), f"the header entry of {NORM} is malformed"),
        (
            lambda header: header[EMBEDDING].update(shape=[64, 320]),
            r"embed_tokens.weight has shape \[64, 320\], config.js",
        ),
        (lambda header: header.update({NORM: 3}), f"the header entry of {NORM} is malformed"),
    ],
)
def test_a_header_that_lies(checkpoint: Path, change: object, message: str) -> None:
    rewrite_header(checkpoint / "model.safetensors", change)
    with pytest.raises(ArtifactError, match=message):
        facts_of(checkpoint)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"abc", "is 3 bytes long: no room for a safetensors header"),
        (struct.pack("<Q", 1 << 40) + b"{}", "says its header has 1099511627776 bytes"),
        (struct.pack("<Q", 2) + b"[]", "the header is not a mapping"),
        (struct.pack("<Q", 2) + b"{x", "the header is not JSON"),
        (struct.pack("<Q", 2) + b"{}", "model.safetensors: no tensor inside; download"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "the header is not JSON"),
    ],
)
def test_files_that_are_no_safetensors(checkpoint: Path, data: bytes, message: str) -> None:
    (checkpoint / "model.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match=message):
        facts_of(checkpoint)


def test_bytes_after_the_last_tensor(checkpoint: Path) -> None:
    with (checkpoint / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ArtifactError, match="holds 4 bytes more than its header describes"):
        facts_of(checkpoint)


def test_config_without_architectures(checkpoint: Path) -> None:
    edit_config(checkpoint, architectures=None)
    with pytest.raises(CompatibilityError, match='config.json names no architecture; add "architectures"'):
        facts_of(checkpoint)


def test_config_missing_broken_or_senseless(checkpoint: Path) -> None:
    edit_config(checkpoint, num_hidden_layers=0)
    with pytest.raises(ArtifactError, match="config.json has no positive num_hidden_layers"):
        facts_of(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="config.json is not JSON"):
        facts_of(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(ArtifactError, match="config.json is missing"):
        facts_of(checkpoint)


def test_pickles_are_refused_with_the_command_that_converts(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(
        CompatibilityError, match=r"the weights are pickles \(pytorch_model.bin\).*convert them.*save_pre"
    ):
        facts_of(checkpoint)


def test_the_same_weights_in_another_form_do_not_count(checkpoint: Path) -> None:
    before = facts_of(checkpoint)
    (checkpoint / "consolidated.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    assert facts_of(checkpoint) == before


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"there are no \*.safetensors files"):
        facts_of(checkpoint)


def test_existing_quantization_is_named(checkpoint: Path) -> None:
    edit_config(checkpoint, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    found = facts_of(checkpoint).quantization
    assert found is not None
    assert (found.method, found.parameters) == ("gptq", {"bits": 4, "group_size": 128})


@pytest.mark.parametrize(
    ("name", "method", "parameters"),
    [
        ("quantize_config.json", "gptq", {"bits": 4}),
        ("quantize_config.json", "awq", {"w_bit": 4}),
        ("quant_config.json", "awq", {"w_bit": 4, "q_group_size": 128}),
    ],
)
def test_files_of_other_quantizers_are_heeded(
    checkpoint: Path, name: str, method: str, parameters: dict[str, int]
) -> None:
    (checkpoint / name).write_text(json.dumps(parameters))
    found = facts_of(checkpoint).quantization
    assert found is not None
    assert (found.method, found.parameters) == (method, parameters)


GATE = "model.layers.0.mlp.gate_proj."


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("qweight", "I32", [64, 64]),
        ("weight", "F8_E4M3", [128, 128]),
        ("weight", "I8", [256, 64]),
        ("weight", "U8", [128, 128]),
    ],
)
def test_weights_that_are_codes_are_heeded(checkpoint: Path, name: str, dtype: str, shape: list[int]) -> None:
    def change(header: dict[str, dict[str, object]]) -> None:
        header[GATE + name] = header.pop(GATE + "weight") | {"dtype": dtype, "shape": shape}

    rewrite_header(checkpoint / "model.safetensors", change)
    found = facts_of(checkpoint).quantization
    assert found is not None
    assert found.parameters == {"tensor": GATE + name, "dtype": dtype}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vocab_size": 321},
            r"shape \[320, 64\], config.json says vocab_size 321, hidden_size 64; the config and the",
        ),
        ({"hidden_size": 128}, r"shape \[320, 64\], config.json says vocab_size 320, hidden_size 128"),
        ({"num_hidden_layers": 4}, "the weights lack decoder layer 3, config.json says num_hidden_layers 4"),
        ({"num_hidden_layers": 2}, "the weights hold 3 decoder layers, config.json says num_hidden_layers 2"),
    ],
)
def test_a_config_of_another_model(checkpoint: Path, changes: dict[str, int], message: str) -> None:
    edit_config(checkpoint, **changes)
    with pytest.raises(ArtifactError, match=message):
        facts_of(checkpoint)


def test_padded_vocabularies_and_further_layers_are_no_contradiction(checkpoint: Path) -> None:
    edit_config(checkpoint, vocab_size=300, num_hidden_layers=2, num_nextn_predict_layers=1)
    assert facts_of(checkpoint).vocab_size == 300


@pytest.mark.parametrize("weight_map", [["a"], {"a": 1}, 3])
def test_an_index_that_is_no_index(checkpoint: Path, weight_map: object) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ArtifactError, match="weight_map in model.safetensors.index.json does not give each tensor"):
        facts_of(checkpoint)


def test_json_nested_too_deep(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("[" * 200_000)
    with pytest.raises(ArtifactError, match="config.json is not JSON"):
        facts_of(checkpoint)


def test_a_70b_config_and_headers_take_no_tensor_data(tmp_path: Path) -> None:
    """A sparse file of 140 GB: only its header is read."""
    save_70b(tmp_path)
    facts = facts_of(tmp_path)
    assert 68e9 < facts.parameters < 72e9
    assert facts.kv_bytes_per_token(2) == 2 * 80 * 8 * 128 * 2
    assert not any(file.whole for file in facts.files if file.path.endswith(".safetensors"))


def save_70b(path: Path) -> None:
    """The config and one sparse shard of a Llama of 70B parameters."""
    hidden, inner, layers, vocab = 8192, 28672, 80, 128256
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": vocab,
        "max_position_embeddings": 131072, "tie_word_embeddings": False,
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": [vocab, hidden], "lm_head.weight": [vocab, hidden], NORM: [hidden]}
    for layer in range(layers):
        block = f"model.layers.{layer}."
        shapes |= {block + f"mlp.{name}.weight": [inner, hidden] for name in ("gate_proj", "up_proj")}
        shapes |= {block + "mlp.down_proj.weight": [hidden, inner]}
        shapes |= {block + f"self_attn.{name}.weight": [hidden, hidden] for name in ("q_proj", "o_proj")}
        shapes |= {block + f"self_attn.{name}.weight": [1024, hidden] for name in ("k_proj", "v_proj")}
        shapes |= {block + f"{name}.weight": [hidden] for name in ("input_layernorm", "post_attention_layernorm")}
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * (shape[0] if len(shape) == 1 else shape[0] * shape[1])
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + offset)
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text("{}")


def test_local_files_read_ranges(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    files = LocalFiles(tmp_path)
    assert files.read("a", 2, 3) == b"234"
    assert files.read("a", 8) == b"89"
