"""`python -m lungseg.cli`."""

from lungseg.cli import main

if __name__ == "__main__":
    main()
