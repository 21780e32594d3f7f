"""What the newest tensorrt_llm/llmapi/llm_args.py has that older ones lack: imported by
tensorrt_llm/_torch/speculative/interface.py @00b6d5a2.
"""

from enum import StrEnum


class AdvancedSamplingMode(StrEnum):
    FULL = "full"
    NO_TOPK = "no_topk"
    NO_TOPP = "no_topp"
    NO_TOPK_NO_TOPP = "no_topk_no_topp"
