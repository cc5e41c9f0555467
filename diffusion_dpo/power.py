"""`compare --power`: how many prompts would show a win rate, before a GPU is spent on too few."""

import json

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import say
from diffusion_dpo.report import Report, words
from diffusion_dpo.report.statistics import prompts_needed
from diffusion_dpo.settings import CompareConfig


def run(config: CompareConfig, win_rate: float) -> int:
    """Print and return the number; the spread between prompts is that of an earlier report in output_dir, if any."""
    path = config.output_dir / "report.json"
    spread, source = None, "one seed a prompt and no ties assumed; an earlier comparison in output_dir would say more"
    if path.exists():
        try:
            report = Report.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from error
        head = words.headline(report)
        spread = head.win_rate_std
        source = f"with {report.seeds_per_prompt} seeds a prompt, prompts differing as in {path}, by {head.name}"
        if not spread:  # all prompts tie, or all are won
            source = f"one seed a prompt and no ties assumed; in {path} prompts do not differ by {head.name}"
    try:
        needed = prompts_needed(win_rate, spread)
    except ValueError as error:
        raise ConfigError(f"--power: {error}") from None
    say(f"{needed} prompts show a win rate of {words.percent(win_rate)} in four comparisons of five ({source})")
    return needed
