"""`python -m diffusion_dpo`: the same as the command `diffusion-dpo`; also what `accelerate launch -m` starts."""

import sys

from diffusion_dpo.cli import main
from diffusion_dpo.launch import start_all

if __name__ == "__main__":
    start_all(sys.argv[1:])
    sys.exit(main())
