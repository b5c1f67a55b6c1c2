"""The command line as ``python -m slidesparse``, where the script is not on the path."""

from .cli import main

if __name__ == "__main__":
    main()
