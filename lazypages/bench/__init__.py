"""`lazypages bench`: our daemon, CRIU's and the least that any handler must do, side by side."""
