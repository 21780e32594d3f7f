"""The Triton Python model `preprocessing`: prompts become token ids, words become word lists."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from model_repo.ensemble.prompt import Limits, Preprocessor, end_ids
from model_repo.ensemble.settings import Settings
from model_repo.llm.text import Codec
from model_repo.llm.wire import BadRequestError

logger = logging.getLogger(__name__)


class TritonPythonModel:
    """What Triton's Python backend drives: initialize, execute."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the tokenizer."""
        settings = Settings(args)
        directory = settings.directory("tokenizer_dir")
        limits = Limits(
            max_seq_len=settings.count("max_seq_len"),
            max_input_tokens=settings.count("max_input_tokens"),
            max_output_tokens=settings.count("max_output_tokens"),
            default_max_tokens=settings.count("default_max_tokens"),
        )
        codec = Codec.load(
            directory, max_input_tokens=limits.max_input_tokens, trust_remote_code=settings.flag("trust_remote_code")
        )
        self._preprocessor = Preprocessor(
            codec, limits, ends=end_ids(directory, codec.tokenizer), special=settings.flag("add_special_tokens")
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request, in order; a bad request gets its own error and harms no other."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            made = self._preprocessor.tensors(inputs)
        except BadRequestError as error:
            return _failure(str(error), pb_utils.TritonError.INVALID_ARG)
        except Exception as error:
            logger.exception("a prompt could not be prepared")
            return _failure(f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)
        wanted = frozenset(request.requested_output_names())
        tensors = [pb_utils.Tensor(name, np.ascontiguousarray(a)) for name, a in made.items() if name in wanted]
        return pb_utils.InferenceResponse(tensors)


def _failure(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
