"""Everything of a checkpoint that is not a tensor: configs, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from trtbuild.compress.request import Request

# Names under which Transformers saves tokenizers and chat templates (tokenization_utils_base.py @5.14.1 and the
# vocabulary files of its tokenizer classes).
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_CHAT_TEMPLATES = "additional_chat_templates"


def write_metadata(request: Request, quantization: dict[str, Any] | None) -> None:
    """Write config.json (the source's, in bf16), generation_config.json and the tokenizer's files to the output.

    ModelOpt writes a config through Transformers, which rewrites fields (RoPE, for one) so that older readers
    misunderstand them; the source's own file is what its readers know.

    Args:
        request: Where the source, the tokenizer and the output are.
        quantization: The flat `quantization_config`, if the checkpoint is quantized.
    """
    config = read_json(request.source / "config.json")
    for section in (config, config.get("text_config")):
        if isinstance(section, dict):
            _set_dtype(section)
            _add_older_rope_names(section)
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    write_json(request.output / "config.json", config)
    generation = request.source / "generation_config.json"
    (request.output / generation.name).unlink(missing_ok=True)
    if generation.exists():
        shutil.copyfile(generation, request.output / generation.name)
    if request.trust_remote_code:
        _copy(request.source, request.output, ("*.py",))
    _copy(request.tokenizer, request.output, _TOKENIZER_FILES)
    _use_older_tokenizer_names(request.output / "tokenizer_config.json")
    if (request.tokenizer / _CHAT_TEMPLATES).is_dir():
        shutil.copytree(request.tokenizer / _CHAT_TEMPLATES, request.output / _CHAT_TEMPLATES, dirs_exist_ok=True)


def _set_dtype(section: dict[str, Any]) -> None:
    for name in ("dtype", "torch_dtype"):
        if name in section:
            section[name] = "bfloat16"
    if "dtype" not in section and "torch_dtype" not in section:
        section["dtype"] = "bfloat16"


def _add_older_rope_names(section: dict[str, Any]) -> None:
    """Name the rotary parameters as Transformers 4 does too, where the source has only the names of Transformers 5.

    TensorRT-LLM up to 1.2 reads configs through Transformers 4.57, which does not know `rope_parameters` and would
    silently rotate with a base of 10,000. Transformers 5 gives its own names precedence
    (huggingface/transformers: src/transformers/modeling_rope_utils.py `convert_rope_params_to_dict` @5.14.1).
    """
    parameters = section.get("rope_parameters")
    if not isinstance(parameters, dict) or section.keys() & {"rope_theta", "rope_scaling"}:
        return
    local = parameters.get("sliding_attention")
    whole = parameters.get("full_attention", parameters)
    if not isinstance(whole, dict) or "rope_theta" not in whole:
        return
    section["rope_theta"] = whole["rope_theta"]
    if whole.get("rope_type", "default") != "default":
        section["rope_scaling"] = {name: value for name, value in whole.items() if name != "rope_theta"}
    if isinstance(local, dict) and "rope_theta" in local:
        section["rope_local_base_freq"] = local["rope_theta"]  # Gemma 3's name


def _use_older_tokenizer_names(path: Path) -> None:
    """Name the tokenizer's class and special tokens as Transformers 4 does, where the source names them as 5 does.

    Transformers 5 reads both; Transformers 4.57, with which TensorRT-LLM 1.2 reads tokenizers, refuses the newer names.
    """
    if not path.exists():
        return
    config = read_json(path)
    older = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        older["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        older["additional_special_tokens"] = older.pop("extra_special_tokens")
    if older != config:
        write_json(path, older)


def _copy(source: Path, output: Path, patterns: tuple[str, ...]) -> None:
    for path in sorted({path for pattern in patterns for path in source.glob(pattern)}):
        shutil.copyfile(path, output / path.name)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` with a final newline, keys in their order."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
