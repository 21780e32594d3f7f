"""``python -m trtbuild`` is the command line."""

from trtbuild.cli import main

main()
