"""The drafter that an engine's configuration asks for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trtbuild.errors import ArtifactError, CompatibilityError
from trtbuild.runtime.capture import Capture
from trtbuild.runtime.config import EngineConfig
from trtbuild.runtime.drafts.config import SpeculativeConfig
from trtbuild.runtime.drafts.draft import Drafter
from trtbuild.runtime.drafts.draft_model import ModelDrafter
from trtbuild.runtime.drafts.eagle3 import Eagle3Drafter
from trtbuild.runtime.drafts.eagle3_model import Eagle3Model
from trtbuild.runtime.drafts.medusa import MedusaDrafter, read_heads
from trtbuild.runtime.drafts.ngram import NgramDrafter
from trtbuild.runtime.drafts.speculation import Speculation
from trtbuild.runtime.model import ModelRunner


def load_speculation(engine_dir: Path, config: EngineConfig, runner: ModelRunner) -> Speculation | None:
    """The speculation of the engine over `runner`, None where nothing is drafted.

    Raises:
        ArtifactError: a file of the draft is missing or damaged.
        CompatibilityError: the draft does not fit the model.
        HostError: the host lacks the memory.
    """
    section = config.speculative
    if section is None:
        return None
    return Speculation(section, load_drafter(engine_dir, section, config, runner), config)


def load_drafter(engine_dir: Path, section: SpeculativeConfig, config: EngineConfig, runner: ModelRunner) -> Drafter:
    """The drafter of `section` alone; raises as `load_speculation` does."""
    if section.draft is None:
        return NgramDrafter(section)
    directory = engine_dir / section.draft
    if not (directory / "config.json").is_file():
        raise ArtifactError(f"{directory}: holds no draft model", "build the package again")
    if section.method == "medusa":
        return _medusa(directory, section, runner)
    if section.method == "eagle3":
        return _eagle3(directory, config, runner)
    return _draft_model(directory, config, runner)


def _draft_model(directory: Path, config: EngineConfig, runner: ModelRunner) -> ModelDrafter:
    # As many tokens as the model's own cache: then a request with a place there has one here, or nearly always.
    cache = replace(config.kv_cache, dtype="auto", max_tokens=runner.num_blocks * runner.block_size)
    config = replace(config, kv_cache=cache, speculative=None)
    draft = ModelRunner.load(directory, config)
    if draft.vocab_size > runner.vocab_size:
        raise CompatibilityError(
            f"{directory}: the draft has a vocabulary of {draft.vocab_size}, and the model's has {runner.vocab_size}",
            "use a draft model of the same family: its token ids go to the model as they are",
        )
    layers = draft.hf_config.num_hidden_layers
    runner.notes.append(f"drafts come from {type(draft.model).__name__} with {layers} layers")
    return ModelDrafter(draft, config, runner.vocab_size)


def _medusa(directory: Path, section: SpeculativeConfig, runner: ModelRunner) -> MedusaDrafter:
    runner.capture = Capture(runner.model, ())
    like = runner.model.get_input_embeddings().weight
    heads = read_heads(directory, like, runner.vocab_size)
    runner.notes.append(f"drafts come from {len(heads)} Medusa heads")
    longest = max(map(len, section.choices or ((),)))
    if longest > len(heads):
        raise ArtifactError(f"speculative.choices: a path of {longest} tokens, and the draft has {len(heads)} heads")
    return MedusaDrafter(heads, runner.vocab_size, section.choices)


def _eagle3(directory: Path, config: EngineConfig, runner: ModelRunner) -> Eagle3Drafter:
    draft = Eagle3Model(directory, runner.model, runner.num_blocks * runner.block_size)
    runner.capture = Capture(runner.model, draft.captured)
    runner.notes.append(f"drafts come from an EAGLE-3 draft that reads the layers {list(draft.captured)}")
    return Eagle3Drafter(draft, config.kv_cache, runner.num_blocks, runner.vocab_size)


def draft_bytes(engine_dir: Path, config: EngineConfig) -> int:
    """What the draft's weights take on a GPU, by their files; nothing without a draft."""
    if config.speculative is None or config.speculative.draft is None:
        return 0
    return sum(path.stat().st_size for path in (engine_dir / config.speculative.draft).glob("*.safetensors"))
