"""Which of a server's models to ask, and by which names: the server's own metadata says so."""

from __future__ import annotations

import http.client
import json
from typing import Any

from trtbuild.errors import HostError, RequestError
from trtbuild.serving.client import grpc_channel, grpc_refusal, split_url
from trtbuild.serving.contract import ENSEMBLE, LLM, layout_of

_TEXT_MODEL = "tensorrt_llm_bls"
_ENGINE_INPUT = "request_output_len"
_TIMEOUT_S = 30.0


def find_layout(url: str, model: str) -> tuple[str, str]:
    """(model to ask, its layout) for the model of this name behind `url`.

    In layout ensemble the model `tensorrt_llm` takes token ids alone; a text goes to `tensorrt_llm_bls` beside it.

    Raises:
        RequestError: `url` is no address, or the server has no such model.
        HostError: nobody answers.
    """
    scheme, address = split_url(url)
    names = _over_grpc(address, model) if scheme == "grpc" else _over_http(address, model)
    layout = layout_of(names)
    if layout is None and _ENGINE_INPUT in names:
        return _TEXT_MODEL, ENSEMBLE
    return model, layout or LLM


def _over_http(address: str, model: str) -> list[str]:
    connection = http.client.HTTPConnection(address, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", f"/v2/models/{model}")
        response = connection.getresponse()
        found = json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise HostError(f"http://{address}: {error}", "is the server running? `trtbuild serve PACKAGE`") from error
    finally:
        connection.close()
    if response.status != 200:
        raise RequestError(f"{model}: {_message(found)}")
    return [str(tensor["name"]) for tensor in found.get("inputs", [])]


def _message(found: Any) -> str:
    return str(found.get("error", found)) if isinstance(found, dict) else str(found)


def _over_grpc(address: str, model: str) -> list[str]:
    import tritonclient.grpc as triton

    client = grpc_channel(address)
    try:
        found = client.get_model_metadata(model, client_timeout=_TIMEOUT_S)
    except triton.InferenceServerException as error:
        raise grpc_refusal(address, error) from error
    finally:
        client.close()
    return [str(tensor.name) for tensor in found.inputs]
