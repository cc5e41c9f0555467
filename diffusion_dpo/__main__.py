"""`python -m diffusion_dpo`: the same as the command `diffusion-dpo`."""

import sys

from diffusion_dpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
