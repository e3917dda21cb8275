"""Launch `coe train`, from a clone that is not installed too; torchrun takes this file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from megatron_coe.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
