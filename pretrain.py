"""Pretrain an encoder: `python pretrain.py [FILE.yaml ...] [section.key=value ...]`, `--help` for every key."""

import sys

from mae.commands.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
