"""The child process of the conversion: ``python -m trtbuild.convert REQUEST.json``."""

from trtbuild.convert.run import run
from trtbuild.worker import serve

serve(run)
