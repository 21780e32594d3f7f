"""The child process of the compress step: ``python -m trtbuild.compress REQUEST.json``."""

from trtbuild.compress.run import run
from trtbuild.worker import serve

serve(run)
