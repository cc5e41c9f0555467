"""`python -m diffusion_dpo`, and `accelerate launch -m diffusion_dpo train x.yaml`."""

import sys

from diffusion_dpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
