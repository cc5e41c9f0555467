"""Starting as many processes as `accelerate launch` was asked for, where it leaves that to MPI.

With `--multi_gpu` the launcher starts every process itself, through torchrun. With `--cpu --num_processes 2` it starts
one, which it tells where to meet the others (MASTER_ADDR), but neither their number nor who is to start them. Here
torchrun does it. The number is read off the launcher's command line, by its
own parser, so that its configuration file counts as well.
"""

import logging
import os
import sys
from collections.abc import Sequence


def start_all(arguments: Sequence[str]) -> None:
    """Replace this process by torchrun, if it stands for several; otherwise return at once."""
    env = os.environ
    if env.get("ACCELERATE_USE_CPU", "").lower() != "true" or "MASTER_ADDR" not in env or "WORLD_SIZE" in env:
        return
    count = _asked_for()
    if count > 1:
        env.pop("MASTER_ADDR")
        env.pop("MASTER_PORT", None)
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *torchrun, "-m", "diffusion_dpo", *arguments])


def _asked_for() -> int:
    """Return `--num_processes` of the `accelerate launch` that started this process; 1 where there is none."""
    import psutil
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    words = psutil.Process(os.getppid()).cmdline()
    start = next((place for place, word in enumerate(words) if word == "launch" or "accelerate-launch" in word), None)
    if start is None:
        return 1
    logging.disable(logging.WARNING)  # it has said already which defaults it takes
    parsed, *_ = _validate_launch_command(launch_command_parser().parse_args(words[start + 1 :]))
    logging.disable(logging.NOTSET)
    return int(parsed.num_processes or 1)
