"""A small stand-in for Triton's `triton_python_backend_utils`: what model.py uses, and what a test can look at."""

from __future__ import annotations

import sys
import threading
import types
from typing import Any

import numpy as np

FINAL = 1


class Tensor:
    def __init__(self, name: str, array: Any) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array


class TritonError:
    INVALID_ARG, INTERNAL, NOT_FOUND, CANCELLED = "INVALID_ARG", "INTERNAL", "NOT_FOUND", "CANCELLED"

    def __init__(self, message: str, code: str) -> None:
        self.text, self.kind = message, code


class InferenceResponse:
    def __init__(self, output_tensors: Any = (), error: Any = None) -> None:
        self.error = error
        self.values = {tensor.name(): tensor.as_numpy() for tensor in output_tensors}


class Sender:
    """Collects responses; refuses one after the final one, as Triton does."""

    def __init__(self) -> None:
        self.responses: list[InferenceResponse] = []
        self.gone = False
        self.done = threading.Event()

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        assert not self.done.is_set(), "a response after the final one"
        self.responses.append(response)
        if flags == FINAL:
            self.done.set()

    def is_cancelled(self) -> bool:
        assert not self.done.is_set(), "asked about a request that has ended"
        return self.gone

    def wait(self) -> list[InferenceResponse]:
        assert self.done.wait(10), "no final response"
        return self.responses

    def text(self) -> str:
        pieces = [response.values["text_output"][0] for response in self.wait() if "text_output" in response.values]
        return b"".join(pieces).decode()


class Request:
    def __init__(
        self, inputs: dict[str, Any], *, outputs: list[str], request_id: str = "", parameters: str = "{}"
    ) -> None:
        self.sender = Sender()
        self._parameters = parameters
        self._inputs = [Tensor(name, np.asarray(value)) for name, value in inputs.items()]
        self._outputs, self._id = outputs, request_id

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def request_id(self) -> str:
        return self._id

    def parameters(self) -> str:
        return self._parameters

    def requested_output_names(self) -> list[str]:
        return self._outputs

    def get_response_sender(self) -> Sender:
        return self.sender


class Metric:
    def __init__(self, labels: dict[str, str]) -> None:
        self.value = 0.0

    def set(self, value: float) -> None:
        self.value = value


class MetricFamily:
    GAUGE = "gauge"

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.name = name

    def Metric(self, labels: dict[str, str]) -> Metric:  # noqa: N802 - Triton's name
        return Metric(labels)


def install() -> None:
    """Make `import triton_python_backend_utils` find this."""
    module = types.ModuleType("triton_python_backend_utils")
    module.__dict__.update(
        Tensor=Tensor,
        InferenceResponse=InferenceResponse,
        TritonError=TritonError,
        TritonModelException=type("TritonModelException", (Exception,), {}),
        MetricFamily=MetricFamily,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL,
        Logger=types.SimpleNamespace(log_info=lambda message: None),
    )
    sys.modules["triton_python_backend_utils"] = module
