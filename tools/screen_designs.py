"""Launch `experiments.screen`, from a clone that is not installed too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.screen import main

if __name__ == "__main__":
    sys.exit(main())
