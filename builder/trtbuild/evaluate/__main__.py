"""The evaluation step as a child process: ``python -m trtbuild.evaluate REQUEST.json``."""

from __future__ import annotations

from trtbuild.evaluate.run import run
from trtbuild.worker import serve

serve(run)
