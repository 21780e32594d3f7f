"""A TensorRT-LLM that builds engines of a few bytes. Like the real one it refuses a process that PMIx claims."""

import os

if "PMIX_RANK" in os.environ and "OMPI_COMM_WORLD_RANK" not in os.environ:
    raise RuntimeError("PMIx is detected, but OMPI_COMM_WORLD_RANK is not set")
__version__ = os.environ.get("FAKE_VERSION", "1.2.1")
