"""The command line as ``python -m slidesparse``, where the script is not on the path."""

from .cli import main

main()
