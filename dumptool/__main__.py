"""``python -m dumptool``."""

from dumptool.cli import main

main()
