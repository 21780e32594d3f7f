"""Ask a Triton server of either layout: over gRPC streaming, or over HTTP `generate` and `generate_stream`."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trtbuild.errors import HostError, RequestError, ToolError
from trtbuild.serving.contract import COUNTS, ENSEMBLE, LLM, request_inputs, wire_type

DEFAULT_MODEL = "tensorrt_llm"
# A proxy of the environment has no business between us and a server that was named by address.
_NO_PROXY = [("grpc.enable_http_proxy", 0)]
_BIG_MESSAGE = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, put together from its responses; times in seconds since the request was sent."""

    text: str
    output_ids: tuple[int, ...]
    finish_reason: str
    stop_reason: str
    num_input_tokens: int
    num_output_tokens: int
    responses: int
    seconds_to_first_token: float
    seconds: float
    cumulative_logprob: float | None = None
    logprobs: tuple[Mapping[str, Any], ...] = ()
    prompt_logprobs: tuple[Mapping[str, Any] | None, ...] = ()
    outputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Rate over the whole request, prompt included."""
        return self.num_output_tokens / self.seconds if self.seconds > 0 else 0.0


Inputs = Mapping[str, Any]
OnText = Callable[[str], None]


def ask(
    url: str,
    prompt: str | Sequence[Mapping[str, Any]] | None = None,
    *,
    model: str = DEFAULT_MODEL,
    layout: str = LLM,
    streaming: bool = True,
    on_text: OnText | None = None,
    timeout_s: float = 600.0,
    **inputs: Any,
) -> Answer:
    """The model's answer to a text or to a list of chat messages.

    Args:
        url: ``http://host:port`` asks over HTTP, ``host:port`` or ``grpc://host:port`` over gRPC.
        prompt: a text, or chat messages; leave it out and give ``input_ids=[...]`` to send token ids.
        model: the model's name on the server.
        layout: whose names the model's inputs have, ``llm``, ``ensemble`` or ``engine`` (`discovery.find_layout` asks
            the server).
        streaming: whether the answer comes in pieces.
        on_text: called with every piece of text.
        timeout_s: limit for the whole answer.
        **inputs: further inputs by name; ``max_tokens=8`` is short for ``sampling_param_max_tokens=8``.

    Raises:
        RequestError: `url` is none of these, or the server refuses the request; then the message is the server's.
        HostError: nobody answers at `url`.
        ToolError: the server failed, or did not finish in time.
    """
    sent = request_inputs(prompt, streaming=streaming, layout=layout, **inputs)
    scheme, address = split_url(url)
    responses = _over_grpc if scheme == "grpc" else _over_http
    cumulative = "streaming_cumulative" in sent

    def answer() -> Answer:
        return _collect(responses(address, model, sent, timeout_s), on_text, cumulative=cumulative, layout=layout)

    try:
        return answer()
    except RequestError as error:
        # TensorRT-LLM's backend of 0.17 to 0.19 does not count tokens; nobody asked for that but this client.
        if layout != ENSEMBLE or "input 'return_num_" not in error.message:
            raise
    for name in COUNTS.difference(inputs):
        sent.pop(name, None)
    return answer()


def split_url(url: str) -> tuple[str, str]:
    """The scheme (``http`` or ``grpc``) and ``host:port``; whatever else a URL may hold would be dropped in silence."""
    try:
        parts = urllib.parse.urlsplit(url if "://" in url else f"grpc://{url}")
        usable = bool(parts.hostname and parts.port) and parts.username is None
    except ValueError:  # a port that is no number, an IPv6 address without its bracket
        usable = False
    if usable and parts.scheme in ("http", "grpc") and not (parts.path.strip("/") or parts.query or parts.fragment):
        return parts.scheme, parts.netloc
    secure = usable and parts.scheme in ("https", "grpcs")
    why = "is encrypted, which this client does not speak" if secure else "is no address that this client can ask"
    raise RequestError(f"url: {url!r} {why}", "give http://host:port, grpc://host:port or host:port")


def _collect(responses: Iterator[dict[str, Any]], on_text: OnText | None, *, cumulative: bool, layout: str) -> Answer:
    started = time.perf_counter()
    pieces: list[str] = []
    ids: list[int] = []
    logprobs: list[str] = []
    last: dict[str, Any] = {}
    prompt_logprobs: list[str] = []
    generated = 0
    first = count = 0.0
    for response in responses:
        count += 1
        first = first or time.perf_counter() - started
        if cumulative:
            pieces, ids, logprobs = [], [], []
        pieces += _strings(response.get("text_output"))
        ids += [int(token) for token in _list(response.get("output_ids"))]
        logprobs += _strings(response.get("logprobs"))
        prompt_logprobs = _strings(response.get("prompt_logprobs")) or prompt_logprobs
        # A response of layout ensemble counts its own tokens, the last one of layout llm all of them.
        counted = sum(int(number) for number in _list(response.get("num_output_tokens")))
        generated = generated + counted if layout == ENSEMBLE else counted
        last |= response
        if on_text is not None and pieces and pieces[-1]:
            on_text(pieces[-1])
    seconds = time.perf_counter() - started
    if not count:
        raise ToolError("the server ended the answer without a single response", "see its log")
    return Answer(
        text="".join(pieces),
        output_ids=tuple(ids),
        finish_reason="".join(_strings(last.get("finish_reason"))[:1]),
        stop_reason="".join(_strings(last.get("stop_reason"))[:1]),
        num_input_tokens=int((_list(last.get("num_input_tokens")) or [0])[0]),
        num_output_tokens=generated,
        responses=int(count),
        seconds_to_first_token=first,
        seconds=seconds,
        cumulative_logprob=_cumulative(last),
        logprobs=tuple(json.loads(entry) for entry in logprobs),
        prompt_logprobs=tuple(json.loads(entry) for entry in prompt_logprobs),
        outputs=last,
    )


def _cumulative(last: Mapping[str, Any]) -> float | None:
    values = _list(last.get("cumulative_logprob", last.get("cum_log_probs")))
    return float(values[0]) if values else None


def _list(value: Any) -> list[Any]:
    """The elements of an output; Triton's `generate` writes a tensor of one element as a bare value."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _strings(value: Any) -> list[str]:
    return [item.decode("utf-8") if isinstance(item, bytes) else str(item) for item in _list(value)]


def _over_http(address: str, model: str, sent: Inputs, timeout_s: float) -> Iterator[dict[str, Any]]:
    """Responses of ``generate`` (one) or ``generate_stream`` (server-sent events)."""
    streaming = sent.get("streaming", sent.get("stream"))
    path = "generate_stream" if streaming else "generate"
    wire = {("id" if name == "request_id" else name): value for name, value in sent.items()}
    connection = http.client.HTTPConnection(address, timeout=timeout_s)
    try:
        # Triton 2.51 crashes on a large body of the content type that many clients send by default.
        headers = {"Content-Type": "application/json"}
        connection.request("POST", f"/v2/models/{model}/{path}", json.dumps(wire), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise _refusal(response.status, response.read())
        if not streaming:
            yield _checked(json.loads(response.read()))
            return
        for line in response:
            if line.startswith(b"data:"):
                yield _checked(json.loads(line[5:]))
    except TimeoutError as error:
        raise ToolError(f"http://{address}: no answer within {timeout_s:g} s", "see the server's log") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise HostError(f"http://{address}: {error}", "is the server running? `trtbuild serve PACKAGE`") from error
    finally:
        connection.close()


def _checked(body: Any) -> dict[str, Any]:
    """A response's body; Triton reports some errors with status 200."""
    if not isinstance(body, dict):
        raise ToolError(f"the server answered with {type(body).__name__} instead of an object", "see its log")
    if "error" in body:
        raise RequestError(str(body["error"]))
    return body


def _refusal(status: int, body: bytes) -> Exception:
    try:
        message = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        message = body.decode("utf-8", "replace").strip() or "no message"
    if 400 <= status < 500:
        return RequestError(message)
    return ToolError(f"the server answered with status {status}: {message}", "see its log")


def _over_grpc(address: str, model: str, sent: Inputs, timeout_s: float) -> Iterator[dict[str, Any]]:
    """Responses of one request over a gRPC stream; leaving the iterator early cancels the request."""
    import tritonclient.grpc as triton

    received: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    deadline = time.monotonic() + timeout_s
    client = grpc_channel(address)
    request_id = str(sent.get("request_id", ""))
    done = False
    try:
        client.start_stream(lambda result, error: received.put((result, error)))
        rows = () if "return_finish_reason" in sent else (1,)  # the models of layout ensemble have a batch dimension
        tensors = [_tensor(triton, name, value, rows) for name, value in sent.items() if name != "request_id"]
        # A stream that has failed already refuses the request here and says why through the callback.
        with contextlib.suppress(triton.InferenceServerException):
            client.async_stream_infer(model, tensors, request_id=request_id, enable_empty_final_response=True)
        while not done:
            try:
                result, error = received.get(timeout=max(deadline - time.monotonic(), 0.001))
            except queue.Empty:
                raise ToolError(f"{address}: no answer within {timeout_s:g} s", "see the server's log") from None
            if error is not None:
                raise grpc_refusal(address, error)
            message = result.get_response()
            done = message.parameters["triton_final_response"].bool_param
            values = {output.name: result.as_numpy(output.name).reshape(-1).tolist() for output in message.outputs}
            if values:
                yield values
    finally:
        client.stop_stream(cancel_requests=not done)
        client.close()


def grpc_channel(address: str) -> Any:
    """A client of the server at `address`; the caller closes it."""
    import tritonclient.grpc as triton

    sizes = [("grpc.max_send_message_length", _BIG_MESSAGE), ("grpc.max_receive_message_length", _BIG_MESSAGE)]
    return triton.InferenceServerClient(address, channel_args=[*_NO_PROXY, *sizes])


def grpc_refusal(address: str, error: Any) -> Exception:
    """The error that says what a gRPC call was refused or failed for."""
    status, message = str(error.status()), str(error.message())
    if "UNAVAILABLE" in status:
        return HostError(f"{address}: {message}", "is the server running? `trtbuild serve PACKAGE`")
    # A stream carries a model's own error without a status.
    if status in ("None", "") or "INVALID_ARGUMENT" in status:
        return RequestError(message)
    return ToolError(f"the server answered with {status}: {message}", "see its log")


def _tensor(triton: Any, name: str, value: Any, rows: tuple[int, ...] = ()) -> Any:
    import numpy as np

    values = list(value) if isinstance(value, list | tuple) else [value]
    kind = wire_type(name, values)
    if kind == "BYTES":
        array = np.array([item.encode("utf-8") for item in values], dtype=np.object_)
    else:
        dtypes: dict[str, Any] = {"BOOL": np.bool_, "INT32": np.int32, "FP32": np.float32, "UINT64": np.uint64}
        try:
            array = np.array(values, dtype=dtypes[kind])
        except (OverflowError, ValueError) as error:
            raise RequestError(f"{name}: {value!r} does not fit into {kind} ({error})") from error
    array = array.reshape(*rows, len(values))
    tensor = triton.InferInput(name, list(array.shape), kind)
    tensor.set_data_from_numpy(array)
    return tensor
