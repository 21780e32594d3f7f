"""The child process of the conversion of adapters: ``python -m trtbuild.convert.lora REQUEST.json``."""

from trtbuild.convert.lora.write import run
from trtbuild.worker import serve

serve(run)
