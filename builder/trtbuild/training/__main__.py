"""The child process of the draft step: ``python -m trtbuild.training REQUEST.json``."""

from trtbuild.training.run import run
from trtbuild.worker import serve

serve(run)
