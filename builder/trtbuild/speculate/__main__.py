"""The measurement as a child process: ``python -m trtbuild.speculate REQUEST.json``."""

from __future__ import annotations

from trtbuild.speculate.run import run
from trtbuild.worker import serve

serve(run)
