"""The draft of EAGLE-3: what its files must hold for TensorRT-LLM to load it beside a model.

Keys of its config.json and names of its tensors: tensorrt_llm/_torch/models/modeling_speculative.py as of the 1.3
release candidates (michaelfeil/TensorRT-LLM @16139315c741face7d907d6baed5de331b141442, the same in NVIDIA/TensorRT-LLM
@00679c66c3e38f6d2651ad0a5bef0f94d862e36c): `Eagle3DraftModel`, `Eagle3DecoderLayer`, `Eagle3ForCausalLM.load_weights`.
Which class loads it with two engines: tensorrt_llm/_torch/models/modeling_auto.py @01bffee1. The captured layers by
ModelOpt's key (nvidia-modelopt 0.47, modelopt/torch/export/plugins/hf_spec_configs.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trtbuild.checkpoint_files import CheckpointFiles
from trtbuild.errors import ArtifactError
from trtbuild.model import ModelFacts, read_tensors

CAPTURED_BY_DEFAULT = 3  # {1, half - 1, last - 3}
LEAST_LAYERS = 6  # fewer have no such layers: `Eagle3SpecMetadata`, tensorrt_llm/_torch/speculative/eagle3.py @001e6700
_CLASS = "LlamaForCausalLM"
# ModelOpt's exporter and others call a decoder layer `layers.0`; releases before 1.3 know `midlayer` only.
OTHER_LAYER = re.compile(r"^layers\.(\d+)\.")
_MATRICES = ("q", "k", "v", "o")


@dataclass(frozen=True, slots=True, kw_only=True)
class Eagle3:
    """A draft as its files describe it; `shapes` by the names that TensorRT-LLM gives the tensors.

    `captured` are the model's layers that it was trained on, where its config says so.
    """

    architecture: str
    model_type: str
    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    vocab_size: int
    draft_vocab_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    context_length: int
    captured: tuple[int, ...] | None
    eagle_config: Mapping[str, Any]
    fc_norm: bool
    quant_algo: str | None
    shapes: Mapping[str, tuple[int, ...]]


def read_eagle3(files: CheckpointFiles) -> Eagle3:
    """The draft in `files`.

    Raises:
        ArtifactError: a file is missing or damaged, or config.json lacks a number.
        CompatibilityError: the weights are pickles.
    """
    names = files.names_and_sizes()
    config = _json(files, "config.json")
    if not config:
        raise ArtifactError(f"{files.where}: config.json is missing", "give the directory of an EAGLE-3 draft")
    nested = config.get("eagle_config")
    eagle = nested if isinstance(nested, dict) else {}
    number = _Numbers(config, files.where)
    hidden, heads = number("hidden_size"), number("num_attention_heads")
    vocabulary, layers = number("vocab_size"), number("num_hidden_layers")
    beside = _json(files, "hf_quant_config.json") if "hf_quant_config.json" in names else {}
    quantized = beside.get("quantization") or config.get("quantization_config") or {}
    return Eagle3(
        architecture=str((config.get("architectures") or [""])[0]),
        model_type=str(config.get("model_type", "")),
        hidden_size=hidden,
        target_hidden_size=number("target_hidden_size", hidden),
        intermediate_size=number("intermediate_size"),
        vocab_size=vocabulary,
        draft_vocab_size=number("draft_vocab_size"),
        num_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", hidden // heads),
        context_length=number("max_position_embeddings"),
        captured=_layers(eagle.get("eagle_aux_hidden_state_layer_ids")),
        eagle_config=eagle,
        fc_norm=bool(config.get("fc_norm", False)),
        quant_algo=quantized.get("quant_algo") or quantized.get("quant_method"),
        shapes={loaded_name(tensor.name, layers): tensor.shape for tensor in read_tensors(files)},
    )


def loaded_name(name: str, layers: int) -> str:
    """What TensorRT-LLM calls a tensor of a draft with this number of decoder layers."""
    return OTHER_LAYER.sub("midlayer." if layers == 1 else r"midlayer.\1.", name)


def misfits(draft: Eagle3, model: ModelFacts, captured: int) -> list[str]:
    """Why TensorRT-LLM would not load `draft` beside `model`, or would draft nonsense.

    Args:
        draft: what the files say.
        model: the model that verifies.
        captured: how many of its layers are handed to the draft.
    """
    found = []
    if draft.architecture.replace("Eagle3", "") != _CLASS or draft.model_type != "llama":
        shown = f"{draft.architecture or 'no architecture'} ({draft.model_type or 'no model_type'})"
        found.append(f"is {shown}; drafts of EAGLE-3 are {_CLASS} or {_CLASS}Eagle3 of model_type llama")
    sizes = (
        ("reads hidden states of", "hidden_size", draft.target_hidden_size, model.hidden_size),
        ("has the target's vocab_size", "vocab_size", draft.vocab_size, model.vocab_size),
    )
    for what, name, theirs, ours in sizes:
        if theirs != ours:
            found.append(f"{what} {theirs}, and the model's {name} is {ours}")
    if draft.quant_algo is not None:
        found.append(f"is quantized ({draft.quant_algo}): trtbuild takes drafts of EAGLE-3 in bf16 or fp16 only")
    if draft.draft_vocab_size > draft.vocab_size:
        found.append(f"has draft_vocab_size {draft.draft_vocab_size}, more than its vocab_size {draft.vocab_size}")
    for name, shape in required(draft, captured).items():
        have = draft.shapes.get(name)
        if have is None:
            found.append(f"lacks the tensor {name}")
        elif have != shape:
            found.append(f"{name} has shape {list(have)}, not {list(shape)}{_why(name, draft, have, captured)}")
    return found


def required(draft: Eagle3, captured: int) -> dict[str, tuple[int, ...]]:
    """The tensors that TensorRT-LLM loads, by its own names, with their shapes as they are unquantized."""
    hidden, read = draft.hidden_size, draft.target_hidden_size
    needed: dict[str, tuple[int, ...]] = {"norm.weight": (hidden,)}
    if captured > 1:
        needed["fc.weight"] = (hidden, read * captured)
    if draft.draft_vocab_size != draft.vocab_size:
        needed["d2t"] = (draft.draft_vocab_size,)
        needed["lm_head.weight"] = (draft.draft_vocab_size, hidden)
    if read != hidden:
        needed["embed_tokens.weight"] = (draft.vocab_size, hidden)
    if draft.eagle_config.get("norm_before_fc"):
        needed["input_norm.weight"] = (read * captured,)
    if draft.fc_norm:
        needed |= {f"fc_norm.{index}.weight": (read,) for index in range(captured)}
    if draft.eagle_config.get("eh_proj_before_attn"):
        needed |= {"enorm.weight": (hidden,), "eh_proj.weight": (hidden, 2 * hidden)}
    for index in range(draft.num_layers):
        needed |= _layer(draft, index)
    return needed


def _layer(draft: Eagle3, index: int) -> dict[str, tuple[int, ...]]:
    prefix = "midlayer." if draft.num_layers == 1 else f"midlayer.{index}."
    first, eagle = index == 0, draft.eagle_config
    regular = (eagle.get("next_layer_regular", True) and not first) or eagle.get("eh_proj_before_attn", False)
    hidden, inner = draft.hidden_size, draft.intermediate_size
    inputs, heads = hidden if regular else 2 * hidden, draft.num_attention_heads * draft.head_dim
    shared = draft.num_key_value_heads * draft.head_dim
    shapes = {"q": (heads, inputs), "k": (shared, inputs), "v": (shared, inputs), "o": (hidden, heads)}
    made = {f"{prefix}self_attn.{name}_proj.weight": shapes[name] for name in _MATRICES}
    made |= {f"{prefix}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
    made[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
    norms = ("hidden_norm", "post_attention_layernorm", *(() if regular else ("input_layernorm",)))
    return made | {f"{prefix}{name}.weight": (hidden,) for name in norms}


def _why(name: str, draft: Eagle3, have: tuple[int, ...], captured: int) -> str:
    """What a wrong fc says about the captured layers."""
    if name != "fc.weight" or len(have) != 2 or have[1] % draft.target_hidden_size:
        return ""
    return f": it reads {have[1] // draft.target_hidden_size} layers of the model, and {captured} are captured"


class _Numbers:
    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config, self._where = config, where

    def __call__(self, name: str, default: int | None = None) -> int:
        value = self._config.get(name, default)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            message = f"{self._where}: config.json has no positive {name}, which a draft of EAGLE-3 has"
            raise ArtifactError(message, "give an EAGLE-3 draft: an ordinary model drafts with draft_target")
        return value


def _layers(found: Any) -> tuple[int, ...] | None:
    if not isinstance(found, list) or not found or not all(type(layer) is int for layer in found):
        return None
    return tuple(sorted(set(found)))


def _json(files: CheckpointFiles, name: str) -> dict[str, Any]:
    if name not in files.names_and_sizes():
        return {}
    try:
        value = json.loads(files.read(name))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{files.where}: {name} is not JSON ({error})", "download it again") from None
    return value if isinstance(value, dict) else {}


def few(problems: Iterable[str], most: int = 6) -> list[str]:
    """The first of many problems."""
    found = list(problems)
    more = len(found) - most
    return found if more <= 0 else [*found[:most], f"and {more} more of this kind"]
