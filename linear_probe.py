"""Linear-probe an encoder: `python linear_probe.py RUN [FILE.yaml] [section.key=value ...]`, `--help` for every key."""

import sys

from mae.commands.linear_probe import main

if __name__ == "__main__":
    sys.exit(main())
