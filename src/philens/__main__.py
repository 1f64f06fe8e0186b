"""`python -m philens`: as the command `philens`; what `accelerate launch -m` and `torchrun -m` start."""

import sys

from philens.cli import main

if __name__ == "__main__":
    sys.exit(main())
