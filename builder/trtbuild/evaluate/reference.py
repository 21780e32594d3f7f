"""The original model, run by Transformers itself: what the compressed one is measured against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtbuild.errors import ArtifactError


class Reference:
    """The source checkpoint in float32 on one device."""

    def __init__(self, source: Path, *, device: str, trust_remote_code: bool) -> None:
        self._device = device
        self._model = _load(source, trust_remote_code=trust_remote_code).to(device)

    def logits(self, token_ids: tuple[int, ...]) -> Tensor:
        """The logits after each of `token_ids`, [tokens, vocabulary]."""
        ids = torch.tensor([token_ids], device=self._device)
        with torch.inference_mode():
            result: Tensor = self._model(input_ids=ids, use_cache=False).logits[0]
        return result


def _load(source: Path, *, trust_remote_code: bool) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArtifactError(f"Transformers cannot load the original model from {source}: {reason}") from error
    return model.eval()
