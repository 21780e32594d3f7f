"""The Triton Python model `postprocessing`: token ids become text, also when they come in pieces."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from model_repo.ensemble.detokenize import Detokenizer
from model_repo.ensemble.settings import Settings
from model_repo.llm.text import Codec
from model_repo.llm.wire import BadRequestError

logger = logging.getLogger(__name__)


class TritonPythonModel:
    """What Triton's Python backend drives: initialize, execute."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the tokenizer."""
        settings = Settings(args)
        codec = Codec.load(
            settings.directory("tokenizer_dir"),
            max_input_tokens=1,  # nothing is encoded here
            trust_remote_code=settings.flag("trust_remote_code"),
            skip_special_tokens=settings.flag("skip_special_tokens"),
        )
        self._detokenizer = Detokenizer(codec.decode)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request, in order."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            texts = self._detokenizer.texts(inputs)
        except BadRequestError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        except Exception as error:
            logger.exception("tokens could not be turned into text")
            message = f"{type(error).__name__}: {error}"
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INTERNAL))
        encoded = np.array([text.encode("utf-8", "replace") for text in texts], dtype=np.object_)
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", encoded)])
