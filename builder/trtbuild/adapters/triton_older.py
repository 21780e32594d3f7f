"""The model `tensorrt_llm` of older release lines, and what it means for those that ask it: other names, fewer tensors.

The templates declare what the newest lines have; here a rendered configuration becomes that of an older line. What the
line's backend does not have is declared nowhere, so that Triton refuses a request with it by name; only over its
generate extension Triton passes over unknown names. A guide would be missed there, and `tensorrt_llm_bls` refuses it.
"""

from __future__ import annotations

import re

from trtbuild.releases import OlderBackend

_TENSOR = re.compile(r'^  \{ name: "(\w+)" ')
_MAP = re.compile(r'^      (?:in|out)put_map \{ key: "(\w+)" ')
_REFUSED = ("guided_decoding_guide_type", "guided_decoding_guide")
_LAST = re.compile(r"\},\n\]")


def fit(text: str, backend: OlderBackend, *, executed: bool, asks: bool, refuses: bool) -> str:
    """A rendered ``config.pbtxt`` as this line has it.

    Args:
        text: as a template of layout `ensemble` gives it: one tensor and one map a line.
        backend: what the line's backend calls otherwise, and lacks.
        executed: the model is `tensorrt_llm`, or its draft, whose tensors have the backend's names.
        asks: the model is one that clients ask, with the names of the newest lines.
        refuses: it can refuse an input itself.
    """
    if not (executed or asks):
        return text
    lines = []
    for line in text.splitlines(keepends=True):
        tensor, mapped = _TENSOR.match(line), _MAP.match(line)
        found = tensor or mapped
        if found is not None and found[1] in backend.absent_tensors and not (refuses and found[1] in _REFUSED):
            continue
        if found is not None and found[1] in backend.renamed_inputs and (executed or mapped):
            line = line.replace(f'"{found[1]}"', f'"{backend.renamed_inputs[found[1]]}"', 1)  # noqa: PLW2901
        lines.append(line)
    return _LAST.sub("}\n]", "".join(lines))


def refused(backend: OlderBackend) -> str:
    """The inputs that `tensorrt_llm_bls` declares and refuses, as a parameter's text."""
    return ",".join(name for name in _REFUSED if name in backend.absent_tensors)


def names(backend: OlderBackend) -> str:
    """The renamed inputs as a parameter's text."""
    return ",".join(f"{ours}={theirs}" for ours, theirs in backend.renamed_inputs.items())
