"""Fine-tune an encoder: `python finetune.py RUN [FILE.yaml] [section.key=value ...]`, `--help` for every key."""

import sys

from mae.commands.finetune import main

if __name__ == "__main__":
    sys.exit(main())
