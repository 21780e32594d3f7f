"""Model facts: what a checkpoint's own files say, without loading it.

Only ``config.json``, a few small files and the safetensors headers are read, so that a 70B checkpoint takes as long
as a small one, and a hub repository needs no download.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trtbuild.checkpoint_checks import QUANTIZER_FILES, Quantization, contradictions, find_quantization
from trtbuild.checkpoint_files import CheckpointFiles
from trtbuild.errors import ArtifactError, CompatibilityError
from trtbuild.layer_size import LayerSize, largest_layer
from trtbuild.safetensors_header import HeaderError, TensorInfo, read_header

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
_WHOLE_FILE_LIMIT = 64 << 20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_CHECKPOINT_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".spm", ".vocab")
_NOT_MODEL = ("training_args", "optimizer", "scheduler", "rng_state")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file's identity: whole-file digest below 64 MiB, else the digest of its safetensors header."""

    path: str
    size: int
    sha256: str
    whole: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the files of one checkpoint say; sizes in elements, bytes or tokens as named."""

    architecture: str
    model_type: str
    parameters: int
    weight_bytes: int
    dtypes: Mapping[str, int]
    num_layers: int
    hidden_size: int
    intermediate_size: int | None
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    sliding_window: int | None
    num_experts: int | None
    mtp_layers: int
    tie_word_embeddings: bool
    has_tokenizer: bool
    has_chat_template: bool
    remote_code: bool
    quantization: Quantization | None
    linear_parameters: int
    linear_input_sizes: tuple[int, ...]
    linear_input_examples: tuple[str, ...]  # for each of these sizes a matrix that has it
    largest_layer: LayerSize
    files: tuple[SourceFile, ...]

    @property
    def dtype(self) -> str:
        """The type that most weight bytes have, in safetensors spelling (BF16, F32 ...)."""
        return max(self.dtypes, key=lambda name: self.dtypes[name])

    @property
    def kv_elements_per_token(self) -> int:
        """Keys and values of one token over all layers, in elements."""
        return 2 * self.num_layers * self.num_key_value_heads * self.head_dim

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """Bytes of the KV cache for one token."""
        return self.kv_elements_per_token * bytes_per_element


def read_facts(files: CheckpointFiles) -> ModelFacts:
    """The facts of one checkpoint.

    Raises:
        ArtifactError: a file is missing, truncated or contradicts itself; every such problem is named.
        CompatibilityError: the weights are pickles, or the config names no architecture.
    """
    sizes = files.names_and_sizes()
    config = _config(files, sizes)
    headers = _headers(files, sizes)
    tensors = [tensor for _, found in headers.values() for tensor in found]
    nested = config.get("text_config")
    text: Mapping[str, Any] = nested if isinstance(nested, dict) else config
    numbers = _numbers(text, files.where)
    wrong = contradictions(tensors, text, numbers)
    if wrong:
        raise ArtifactError(
            f"{files.where}: " + "; ".join(wrong), "the config and the weights are of different models: download both"
        )
    inputs = {tensor.shape[-1]: tensor.name for tensor in reversed(tensors) if _is_linear(tensor)}
    dtypes: dict[str, int] = {}
    for tensor in tensors:
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.bytes
    return ModelFacts(
        architecture=_architecture(config, files.where),
        model_type=str(config.get("model_type", "")),
        parameters=sum(_parameters(tensor) for tensor in tensors),
        weight_bytes=sum(tensor.bytes for tensor in tensors),
        dtypes=dtypes,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        has_tokenizer=any(name in sizes for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")),
        has_chat_template="chat_template.jinja" in sizes
        or "chat_template" in _small_json(files, sizes, "tokenizer_config.json"),
        remote_code="auto_map" in config,
        quantization=_quantization(files, sizes, config, tensors),
        linear_parameters=sum(_parameters(tensor) for tensor in tensors if _is_linear(tensor)),
        linear_input_sizes=tuple(sorted(inputs)),
        linear_input_examples=tuple(inputs[size] for size in sorted(inputs)),
        largest_layer=largest_layer(tensors),
        files=tuple(_identities(files, sizes, headers)),
        **numbers,
    )


def read_tensors(files: CheckpointFiles) -> list[TensorInfo]:
    """Every tensor of a checkpoint as the headers describe it.

    Raises:
        ArtifactError, CompatibilityError: as `read_facts`.
    """
    return [tensor for _, found in _headers(files, files.names_and_sizes()).values() for tensor in found]


def _config(files: CheckpointFiles, sizes: Mapping[str, int]) -> dict[str, Any]:
    if "config.json" not in sizes:
        raise ArtifactError(f"{files.where}: config.json is missing", "give the directory of a Hugging Face checkpoint")
    return _small_json(files, sizes, "config.json")


def _small_json(files: CheckpointFiles, sizes: Mapping[str, int], name: str) -> dict[str, Any]:
    """A JSON mapping of the checkpoint; empty where the file is absent."""
    if name not in sizes:
        return {}
    try:
        value = json.loads(files.read(name))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{files.where}: {name} is not JSON ({error})", "download it again") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{files.where}: {name} is not a mapping", "download it again")
    return value


def _architecture(config: Mapping[str, Any], where: str) -> str:
    names = config.get("architectures")
    if not (isinstance(names, list) and names and isinstance(names[0], str)):
        raise CompatibilityError(
            f"{where}: config.json names no architecture",
            'add "architectures": ["..."] with the Transformers class of the model, for example LlamaForCausalLM',
        )
    return str(names[0])


def _headers(files: CheckpointFiles, sizes: Mapping[str, int]) -> dict[str, tuple[bytes, list[TensorInfo]]]:
    """Raw header and tensors of every shard; all damaged shards are reported together."""
    shards, weight_map = _shards(files, sizes)
    found: dict[str, tuple[bytes, list[TensorInfo]]] = {}
    problems: list[str] = []
    for shard in shards:
        if shard not in sizes:
            problems.append(f"{shard} is missing, {INDEX} names it")
            continue
        try:
            found[shard] = read_header(files, shard)
        except HeaderError as error:
            problems.append(str(error))
    if not problems and not any(tensors for _, tensors in found.values()):
        problems.append(f"{', '.join(shards)}: no tensor inside")
    present = {tensor.name: shard for shard, (_, tensors) in found.items() for tensor in tensors}
    if not problems:
        problems += [
            f"{shard} lacks the tensor {name}" for name, shard in weight_map.items() if present.get(name) != shard
        ][:5]
    if problems:
        raise ArtifactError(f"{files.where}: " + "; ".join(problems), "download the named files again")
    return found


def _shards(files: CheckpointFiles, sizes: Mapping[str, int]) -> tuple[list[str], dict[str, str]]:
    weight_map = _small_json(files, sizes, INDEX).get("weight_map", {})
    if not (isinstance(weight_map, dict) and all(isinstance(shard, str) for shard in weight_map.values())):
        message = f"{files.where}: weight_map in {INDEX} does not give each tensor's name a file's name"
        raise ArtifactError(message, "download it again")
    if weight_map:
        return sorted(set(weight_map.values())), weight_map
    if WHOLE in sizes:  # what lies beside it is the same model in another form, as Mistral publishes it
        return [WHOLE], {}
    shards = sorted(name for name in sizes if name.endswith(".safetensors") and "/" not in name)
    if shards:
        return shards, {}
    pickles = [name for name in sizes if name.endswith(_PICKLES) and not name.startswith(_NOT_MODEL)]
    if pickles:
        raise CompatibilityError(
            f"{files.where}: the weights are pickles ({pickles[0]}), which can run code when they are read",
            _pickle_remedy(files.where, pickles),
        )
    raise ArtifactError(f"{files.where}: there are no *.safetensors files", "give a directory with the model's weights")


def _pickle_remedy(where: str, pickles: Sequence[str]) -> str:
    """The command that converts a checkpoint of Transformers; other files it cannot read either."""
    if not any(name.startswith("pytorch_model") for name in pickles):
        return "take the model's Hugging Face version, with config.json and *.safetensors"
    return (
        'convert them where you trust them: python -c "from transformers import AutoModelForCausalLM as M, '
        f"AutoTokenizer as T; [it.from_pretrained('{where}').save_pretrained('SAFE_DIR') for it in (M, T)]\""
    )


def _numbers(text: Mapping[str, Any], where: str) -> dict[str, Any]:
    heads = _number(text, where, "num_attention_heads", "n_head")
    hidden = _number(text, where, "hidden_size", "n_embd", "d_model")
    kv_heads = text.get("num_key_value_heads")
    head_dim = text.get("head_dim")
    window = text.get("sliding_window")
    return {
        "num_layers": _number(text, where, "num_hidden_layers", "n_layer"),
        "hidden_size": hidden,
        "intermediate_size": _optional(text, "intermediate_size", "n_inner", "ffn_dim"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads if isinstance(kv_heads, int) and kv_heads > 0 else heads,
        "head_dim": head_dim if isinstance(head_dim, int) and head_dim > 0 else hidden // max(heads, 1),
        "vocab_size": _number(text, where, "vocab_size"),
        "context_length": _number(text, where, "max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"),
        "sliding_window": window if isinstance(window, int) else None,
        "mtp_layers": _optional(text, "num_nextn_predict_layers") or 0,
        "num_experts": _optional(text, "num_local_experts", "num_experts", "n_routed_experts"),
    }


def _optional(config: Mapping[str, Any], *names: str) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def _number(config: Mapping[str, Any], where: str, *names: str) -> int:
    value = _optional(config, *names)
    if value is None or value < 1:
        raise ArtifactError(
            f"{where}: config.json has no positive {names[0]}", "compare it with the model's original config.json"
        )
    return value


def _parameters(tensor: TensorInfo) -> int:
    """Elements of a weight; packed four-bit weights hold two in a byte, scales are no parameters."""
    if tensor.name.endswith(("_scale", "_scale_2", "input_scale", "pre_quant_scale", "k_scale", "v_scale")):
        return 0
    return tensor.elements * 2 if tensor.dtype == "U8" and tensor.name.endswith(".weight") else tensor.elements


def _is_linear(tensor: TensorInfo) -> bool:
    """Whether this is a matrix inside a decoder layer (or a stack of them): what a format quantizes."""
    inside = ".layers." in tensor.name or tensor.name.startswith("layers.")
    return inside and len(tensor.shape) in {2, 3} and tensor.name.endswith(("weight", "_proj"))


def _quantization(
    files: CheckpointFiles, sizes: Mapping[str, int], config: Mapping[str, Any], tensors: Iterable[TensorInfo]
) -> Quantization | None:
    names = ("hf_quant_config.json", *QUANTIZER_FILES)
    return find_quantization(config, {name: _small_json(files, sizes, name) for name in names}, tensors)


def _identities(
    files: CheckpointFiles, sizes: Mapping[str, int], headers: Mapping[str, tuple[bytes, list[TensorInfo]]]
) -> Iterable[SourceFile]:
    for name, size in sorted(sizes.items()):
        if not name.endswith(_CHECKPOINT_SUFFIXES) or name.startswith(_NOT_MODEL):
            continue
        if name.endswith(".safetensors") and name not in headers:
            continue  # weights that the index does not name are not part of the model
        whole = size <= _WHOLE_FILE_LIMIT or name not in headers
        content = files.read(name) if whole else headers[name][0]
        yield SourceFile(path=name, size=size, sha256=hashlib.sha256(content).hexdigest(), whole=whole)
