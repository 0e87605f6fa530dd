"""``python -m lazypages``."""

from lazypages.cli import main

if __name__ == "__main__":
    main()
