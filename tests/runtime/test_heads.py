"""Medusa heads and EAGLE-3 drafts as ModelOpt exports them: the same drafts as ModelOpt's own, and the same answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from runtime.oracle import own_drafts
from runtime.test_speculation import TIGHT, make_prompts, run, texts
from trtbuild.errors import ArtifactError, CompatibilityError
from trtbuild.runtime import Engine, SamplingParams, SpeculativeConfig

Load = Callable[..., Engine]
CAPTURED = [0, 1, 2]
REDUCED = 96


def widen(module: Any, seed: int) -> None:
    """Random weights, so that drafts differ; ModelOpt starts from zeros and copies."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.12)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


@pytest.fixture(scope="module")
def medusa(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The directory that ModelOpt exports, and its model."""
    import modelopt.torch.speculative as mtsp
    from modelopt.torch.export import export_hf_checkpoint

    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.float32).eval()
    mtsp.convert(model, [("medusa", {"medusa_num_heads": 3, "medusa_num_layers": 1})])
    widen(model.medusa_heads, 5)
    target = tmp_path_factory.mktemp("medusa")
    export_hf_checkpoint(model, export_dir=target)
    return target, model


@pytest.fixture(scope="module")
def eagle3(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The directory that ModelOpt exports for a reduced vocabulary, and its model."""
    import modelopt.torch.speculative as mtsp
    from modelopt.torch.export import export_speculative_decoding
    from modelopt.torch.speculative.config import EAGLE3_DEFAULT_CFG

    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.float32).eval()
    settings = json.loads(json.dumps(EAGLE3_DEFAULT_CFG["config"]))
    settings["eagle_use_torch_compile"] = False
    settings["eagle_export_rope_scaling"] = {}
    settings["eagle_architecture_config"] = {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_hidden_layers": 1, "vocab_size": tiny.VOCAB_SIZE, "draft_vocab_size": REDUCED, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512, "eagle_aux_hidden_state_layer_ids": CAPTURED,
    }  # fmt: skip
    mtsp.convert(model, [("eagle", settings)])
    widen(model.eagle_module, 6)
    # ModelOpt 0.47 puts the hidden state through this norm too, before `hidden_norm`; TensorRT-LLM and we do not. With
    # weights of one that changes nothing.
    torch.nn.init.ones_(model.eagle_module.layers[0].input_layernorm.weight)
    chosen = torch.randperm(tiny.VOCAB_SIZE, generator=torch.Generator().manual_seed(1))[:REDUCED].sort().values
    model.eagle_module.d2t.copy_(chosen - torch.arange(REDUCED))
    target = tmp_path_factory.mktemp("eagle3")
    export_speculative_decoding(model, export_dir=target)
    return target, model


def engine_directory(root: Path, model: Path, draft: Path) -> Path:
    shutil.copytree(model, root / "engine")
    shutil.copytree(draft, root / "engine" / "draft")
    return root / "engine"


def first_drafts(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """What is drafted behind each prompt and the token that the model has put behind it."""
    return [own_drafts(engine, prompt, 5)[len(prompt) + 1] for prompt in prompts]


def test_medusa_heads_draft_what_modelopt_s_do(
    engine: Load, checkpoint: Callable[..., Path], medusa: tuple[Path, Any], tmp_path: Path
) -> None:
    exported, model = medusa
    path = engine_directory(tmp_path, checkpoint("llama"), exported)
    section = SpeculativeConfig("medusa", max_draft_len=3, draft="draft")
    one, prompts = engine(path=path, speculative=section, compute_dtype="float32"), make_prompts(0)
    expected = []
    for prompt in prompts:
        with torch.inference_mode():
            logits = model(torch.tensor([prompt])).medusa_logits
        expected.append([int(head[0, -1].argmax()) for head in logits])
    assert first_drafts(one, prompts) == expected
    assert len({tuple(drafts) for drafts in expected}) > 1


def test_an_eagle3_draft_drafts_what_modelopt_s_does(
    engine: Load, checkpoint: Callable[..., Path], eagle3: tuple[Path, Any], tmp_path: Path
) -> None:
    exported, model = eagle3
    path = engine_directory(tmp_path, checkpoint("llama"), exported)
    section = SpeculativeConfig("eagle3", max_draft_len=3, draft="draft")
    one = engine(path=path, speculative=section, compute_dtype="float32", max_num_tokens=16, enable_block_reuse=False)
    prompts, expected = make_prompts(0), []
    for prompt in prompts:
        with torch.inference_mode():
            _, drafts = model.pseudo_speculative_generate(torch.tensor([prompt]), steps=3)
        expected.append(drafts[0].tolist())
    assert first_drafts(one, prompts) == expected
    assert len({tuple(drafts) for drafts in expected}) > 1


def test_medusa_trees_hold_each_head_s_likeliest_tokens(
    engine: Load,
    checkpoint: Callable[..., Path],
    medusa: tuple[Path, Any],
    tmp_path: Path,
) -> None:
    exported, model = medusa
    choices = ((0,), (1,), (0, 0), (0, 2), (1, 0), (0, 0, 1))
    section = SpeculativeConfig("medusa", max_draft_len=3, draft="draft", choices=choices)
    path = engine_directory(tmp_path, checkpoint("llama"), exported)
    prompts = make_prompts(1)
    one = engine(path=path, speculative=section, compute_dtype="float32")
    for prompt in prompts[:3]:
        with torch.inference_mode():
            heads = [head[0, -1].topk(3).indices.tolist() for head in model(torch.tensor([prompt])).medusa_logits]
        expected = [heads[len(path) - 1][path[-1]] for path in sorted(choices, key=lambda path: (len(path), path))]
        assert own_drafts(one, prompt, 9)[len(prompt) + 1] == expected
    tight = engine(path=path, speculative=section, **TIGHT)
    assert [found.token_ids for found in run(tight, prompts)] == [found.token_ids for found in run(engine(), prompts)]


@pytest.mark.parametrize("method", ["medusa", "eagle3"])
@pytest.mark.parametrize("limits", [{}, TIGHT], ids=["roomy", "tight"])
def test_answers_are_the_same(
    engine: Load, checkpoint: Callable[..., Path], request: Any, tmp_path: Path, method: str, limits: dict[str, Any]
) -> None:
    prompts = make_prompts(1)
    expected = run(engine(), prompts)
    path = engine_directory(tmp_path, checkpoint("llama"), request.getfixturevalue(method)[0])
    one = engine(path=path, speculative=SpeculativeConfig(method, max_draft_len=3, draft="draft"), **limits)
    for _ in range(2):
        assert [found.token_ids for found in run(one, prompts)] == [found.token_ids for found in expected]
    # Longer texts begin in blocks that are reused, of which an EAGLE-3 draft has seen nothing.
    longer = [[*text, 9] for text in texts(prompts, expected)]
    plain = run(engine(), longer)
    assert [found.token_ids for found in run(one, longer)] == [found.token_ids for found in plain]
    assert one.stats().draft_tokens > 100
    assert one.stats().free_blocks == one.stats().total_blocks
    hot = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.2)
    assert all(len(found.token_ids) == 12 for found in run(one, prompts, hot))
    drafter = one._speculation._drafter
    assert drafter is not None
    assert (drafter._hidden if method == "medusa" else drafter._seen) == {}
    if method == "eagle3":
        assert drafter._tables.blocks.num_free == drafter._tables.blocks.num_blocks


@pytest.mark.parametrize("method", ["medusa", "eagle3"])
def test_late_drafts_are_those_of_a_text_that_begins_there(
    engine: Load, checkpoint: Callable[..., Path], request: Any, tmp_path: Path, method: str
) -> None:
    path = engine_directory(tmp_path, checkpoint("llama"), request.getfixturevalue(method)[0])
    section = SpeculativeConfig(method, max_draft_len=3, draft="draft")
    one = engine(path=path, speculative=section, enable_block_reuse=False)
    prompt = make_prompts(2)[0]
    text = prompt + list(run(one, [prompt])[0].token_ids)
    late = own_drafts(one, prompt, 20, text)
    assert one.stats().accepted_draft_tokens > 8
    for length in list(late)[1:5]:
        assert own_drafts(one, text[: length - 1], 5)[length] == late[length]


def changed(source: Path, target: Path, config: dict[str, Any] | None = None, drop: str = "") -> Path:
    shutil.copytree(source, target)
    if config is not None:
        document = json.loads((target / "config.json").read_text(encoding="utf-8"))
        (target / "config.json").write_text(json.dumps(document | config), encoding="utf-8")
    if drop:
        tensors = load_file(target / "model.safetensors")
        del tensors[drop]
        save_file(tensors, target / "model.safetensors")
    return target


WRONG: list[tuple[str, dict[str, Any] | None, str, type[Exception], str]] = [
    ("medusa", {"medusa": None}, "", ArtifactError, "config.json does not say how many heads there are"),
    ("medusa", None, "medusa_heads.1.0.linear.bias", ArtifactError, r"1.0.linear.bias is missing, and \[64\] is"),
    ("eagle3", None, "fc.weight", ArtifactError, r"fc.weight is missing, and \[64, 192\] is needed"),
    ("eagle3", {"vocab_size": 99}, "", CompatibilityError, "has a vocabulary of 99, and the model's has 320"),
    ("eagle3", {"target_hidden_size": 32}, "", CompatibilityError, "reads hidden states of 32, and the model's have"),
    ("eagle3", {"fc_norm": True}, "", CompatibilityError, "the draft has fc_norm, which is not computed here"),
    ("eagle3", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 9]}}, "", CompatibilityError,
     r"LlamaForCausalLM has 3 layers, and the draft reads the layers \[0, 1, 9\]"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "config", "drop", "error", "sentence"), WRONG, ids=lambda value: str(value)[:30])
def test_drafts_that_do_not_fit(
    engine: Load, checkpoint: Callable[..., Path], request: Any, tmp_path: Path, method: str,
    config: dict[str, Any] | None, drop: str, error: type[Exception], sentence: str,
) -> None:  # fmt: skip
    draft = changed(request.getfixturevalue(method)[0], tmp_path / "changed", config, drop)
    path = engine_directory(tmp_path, checkpoint("llama"), draft)
    with pytest.raises(error, match=sentence):
        engine(path=path, speculative=SpeculativeConfig(method, max_draft_len=3, draft="draft"))


def test_heads_for_another_model(
    engine: Load, checkpoint: Callable[..., Path], medusa: tuple[Path, Any], tmp_path: Path
) -> None:
    path = engine_directory(tmp_path, checkpoint("llama", hidden_size=32), medusa[0])
    sentence = "the heads are for 320 tokens and hidden states of 64, and the model has 320 and 32"
    with pytest.raises(CompatibilityError, match=sentence):
        engine(path=path, speculative=SpeculativeConfig("medusa", max_draft_len=3, draft="draft"))


def test_heads_alone_in_a_file_of_their_own(
    engine: Load, checkpoint: Callable[..., Path], medusa: tuple[Path, Any], tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    every = load_file(medusa[0] / "model.safetensors")
    heads = {name.removeprefix("medusa_heads."): every[name] for name in every if name.startswith("medusa_heads.")}
    save_file(heads, alone / "medusa_lm_head.safetensors")
    (alone / "config.json").write_text(json.dumps({"medusa_num_heads": 3, "medusa_num_layers": 1}), encoding="utf-8")
    section = SpeculativeConfig("medusa", max_draft_len=3, draft="draft")
    prompts = make_prompts(3)[:2]
    found = []
    for name, draft in (("one", alone), ("other", medusa[0])):
        path = engine_directory(tmp_path / name, checkpoint("llama"), draft)
        found.append(first_drafts(engine(path=path, speculative=section), prompts))
    assert found[0] == found[1]
    assert [len(drafts) for drafts in found[0]] == [3, 3]
