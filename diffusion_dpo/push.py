"""`push`: the result of a training run -> the Hugging Face hub, after saying what that is.

Files are named one by one, never a folder as a whole: weights, the card, the settings without what is nobody's
business, images that the model drew. Checkpoints, caches, optimizer states and training data have no way in.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from diffusion_dpo.card import local_card
from diffusion_dpo.card.public import public_settings
from diffusion_dpo.card.results import read_results
from diffusion_dpo.card.text import Shown, card_text
from diffusion_dpo.config import ConfigError, command, load
from diffusion_dpo.console import progress, say, warn
from diffusion_dpo.files import read_manifest
from diffusion_dpo.models.lora_file import recognise
from diffusion_dpo.models.lora_write import LORA_FILE
from diffusion_dpo.models.pipeline import POCKET_DIR
from diffusion_dpo.models.safetensors_file import read_facts
from diffusion_dpo.report.plots import NAMES
from diffusion_dpo.sampling import adapter_hash
from diffusion_dpo.settings import PushConfig, TrainConfig
from diffusion_dpo.yaml_dialect import Dumper

_MAX_PREVIEWS = 4
_NO_TOKEN = "there is no token for the hub; run `hf auth login`, or set HF_TOKEN"
_PLACEHOLDER = "OWNER/NAME"


@dataclass
class _Parcel:
    """What is sent: the path in the repository, and a file here or the bytes themselves."""

    files: dict[str, Path | bytes] = field(default_factory=dict)

    def size(self, name: str) -> int:
        """Size in bytes."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size


def run(config: PushConfig) -> str | None:
    """List what is sent, and with `dry_run=false` send it; return its address, None when nothing was sent."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if config.repo_id is not None:
        try:
            validate_repo_id(config.repo_id)
        except HFValidationError as error:
            raise ConfigError(f"repo_id {config.repo_id!r} is no name of a repository: {error}") from error
        if "/" not in config.repo_id:
            raise ConfigError(f"repo_id {config.repo_id!r} has no owner; write owner/{config.repo_id}")
    elif not config.dry_run:
        raise ConfigError("repo_id is missing: where to send it to, as owner/name")
    parcel = _pack(config)
    _list(config, parcel)
    if config.dry_run:
        chosen = {name: getattr(config, name) for name in type(config).model_fields}
        defaults = PushConfig().model_dump()
        changed = {name: value for name, value in chosen.items() if value != defaults[name]}
        settings = {**changed, "repo_id": config.repo_id or _PLACEHOLDER, "dry_run": False}
        say(f"nothing was sent. To send it: {command('push', settings)}")
        return None
    return _send(config, parcel)


# --- what is sent ----------------------------------------------------------------------------------------------------


def _pack(config: PushConfig) -> _Parcel:
    manifest = read_manifest(config.path) if config.path.is_dir() else {}
    if manifest.get("made_by") != "train" or not manifest.get("complete"):
        state = "is not finished" if manifest.get("made_by") == "train" else "is no run folder of train"
        raise ConfigError(f"{config.path} {state}; there is nothing to send yet")
    train = load(TrainConfig, config.path / "config.yaml", is_data=True)
    parcel = _Parcel()
    kind = _add_weights(config.path, parcel)
    kohya = _find_kohya(config)
    if kohya is not None:
        if kohya.name in parcel.files:
            raise ConfigError(f"{kohya} has the name of the LoRA itself; rename it")
        parcel.files[kohya.name] = kohya
    previews = _last_previews(config.path)
    parcel.files |= {f"images/{image.name}": image for image in previews}
    if config.report_path is not None:
        _add_report(config.report_path, parcel)
    shown = Shown(
        kind=kind,
        repo_id=config.repo_id or _PLACEHOLDER,
        kohya_file=None if kohya is None else kohya.name,
        previews=[f"images/{image.name}" for image in previews],
    )
    parcel.files["README.md"] = _card(config, train, manifest, shown)
    text = yaml.dump(public_settings(train, manifest), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=119)
    parcel.files["training_config.yaml"] = text.encode()
    return parcel


def _add_weights(folder: Path, parcel: _Parcel) -> str:
    if (folder / "adapter" / LORA_FILE).exists():
        parcel.files[LORA_FILE] = folder / "adapter" / LORA_FILE
        return "adapter"
    weights = sorted((folder / "unet").glob("diffusion_pytorch_model*.safetensors*"))
    if not weights or not (folder / "unet" / "config.json").exists():
        raise ConfigError(f"{folder} holds neither adapter/{LORA_FILE} nor a whole unet/; there is nothing to send")
    parcel.files |= {f"unet/{file.name}": file for file in [folder / "unet" / "config.json", *weights]}
    return "unet"


def _find_kohya(config: PushConfig) -> Path | None:
    where = config.kohya_path or config.path / "kohya"
    found = [where] if where.is_file() and where.suffix == ".safetensors" else sorted(where.glob("*.safetensors"))
    if len(found) != 1:
        if config.kohya_path is not None:
            raise ConfigError(f"kohya_path {where} should be or hold one .safetensors file; it holds {len(found)}")
        return None
    (file,) = found
    if read_facts(file).is_checkpoint or recognise(file).naming != "kohya":
        raise ConfigError(f"{file} is no LoRA in kohya's names; `export format=kohya` makes one, or move it away")
    made = read_manifest(file.parent)
    if made.get("made_by") == "export":
        strength = made.get("identity", {}).get("adapter_scale")
        if (made.get("adapter"), strength) != (adapter_hash(config.path), 1.0):
            raise ConfigError(
                f"{file} was exported from other weights than those of {config.path} now, or at another strength; "
                "remove its folder and export it again"
            )
    return file


def _last_previews(folder: Path) -> list[Path]:
    steps = sorted((folder / "previews").glob("step-*"))
    return sorted(steps[-1].glob("[0-9][0-9].png"))[:_MAX_PREVIEWS] if steps else []


def _add_report(folder: Path, parcel: _Parcel) -> None:
    folder = folder if folder.is_dir() else folder.parent
    for file in (folder / "report.md", *(folder / "plots" / name for name in NAMES)):
        if file.is_file():
            parcel.files[f"report/{file.relative_to(folder)}"] = file


def _card(config: PushConfig, train: TrainConfig, facts: Mapping[str, Any], shown: Shown) -> bytes:
    """Return the card with results and without paths of this machine; one that somebody has edited stays theirs.

    Raises ConfigError where an edited one names such a path.
    """
    results = None if config.report_path is None else read_results(config.report_path, config.path)
    file = config.path / "README.md"
    text = file.read_text(encoding="utf-8") if file.exists() else None
    if text is None or text == local_card(train, shown.kind, facts):
        return card_text(train, facts, shown, results=results).encode()
    texts = _texts(train.model_dump(mode="json"))
    for place in (*texts, str(config.path.resolve()), str(Path.home()), str(Path.cwd()), str(POCKET_DIR)):
        if place.startswith("/") and len(place) > 1 and place in text:
            raise ConfigError(
                f"{file} was edited, or written by another version, and names {place}, a folder of this machine; take "
                "it out, or remove the file to have it written anew"
            )
    warn(f"{file} was edited, or written by another version: it is sent as it is")
    return text.encode()


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in settings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


# --- sending it ------------------------------------------------------------------------------------------------------


def _list(config: PushConfig, parcel: _Parcel) -> None:
    where = config.repo_id or "a repository of yours (repo_id=owner/name)"
    say(f"to {where}, {'private' if config.private else 'PUBLIC'} if it is new:")
    for name in sorted(parcel.files):
        say(f"  {_size(parcel.size(name)):>9}  {name}")
    say(f"  {_size(sum(map(parcel.size, parcel.files))):>9}  in {len(parcel.files)} files")
    say("of paths in the settings only the last name is kept; checkpoints, cache and training data stay here")


def _send(config: PushConfig, parcel: _Parcel) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi, errors, get_token

    assert config.repo_id is not None
    token = get_token()
    if token is None:
        raise ConfigError(_NO_TOKEN)
    api = HfApi(endpoint=config.endpoint, token=token)
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content))
        for name, content in sorted(parcel.files.items())
    ]
    try:
        with progress("push", len(operations), "files") as advance:
            api.create_repo(config.repo_id, private=config.private, exist_ok=True)
            api.create_commit(config.repo_id, operations, commit_message="Result of a training run of diffusion-dpo")
            advance(len(operations))
    except (errors.HTTPError, OSError, ValueError, RuntimeError) as error:  # the last where a large file is refused
        reason = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        text = " ".join(str(reason).replace(token, "***").split())[:300]
        raise ConfigError(
            f"the hub did not take it: {text.rstrip('.')}. Nothing of this was added to the repository; the same "
            "command tries again"
        ) from error
    url = f"{api.endpoint}/{config.repo_id}"
    say(f"sent: {url}")
    return url


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.2f} GB"
