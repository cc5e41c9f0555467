"""ArcFace as a judge of identity, through insightface: cosine of the face in the image and those in the references."""

import contextlib
import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, PrivateAttr

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import say
from diffusion_dpo.scorers.faces import Face, FaceJudge, unit, version_of
from diffusion_dpo.scorers.weights import content_hash

if TYPE_CHECKING:
    import torch
    from insightface.app import FaceAnalysis

VERSION = 2
"""Raise it when a change of this file or of faces.py changes the values."""
_PAGE = "https://github.com/deepinsight/insightface/releases"
_LICENCE = "non-commercial research only"


class ArcFace(FaceJudge):
    """Cosine of ArcFace embeddings (`arcface`, -1 to 1) of the face in the image and those in its references.

    Known biases: it rewards copies of a reference, with its pose and expression, so bar them (docs/identity.md); it
    falls for profiles, small and blurred faces, whoever they show; faces of groups that were rare in the training data
    are told apart worse; age and style change it, and a painting of a person may score below a photograph of another.
    """

    licence = f"insightface's models: {_LICENCE}; the code is MIT"
    source = "Deng et al. 2019, arXiv 1801.07698"
    weights = "a folder of insightface's ONNX files: a detector and a recogniser"
    prefix = "arcface"

    model: str = "buffalo_l"
    """A folder that holds ONNX files, or the name of a pack below `root`/models. Nothing is downloaded."""
    root: Path = Path("~/.insightface")
    """Where packs are."""
    det_size_px: int | None = Field(None, ge=32, multiple_of=32)
    """Side of the square that the detector sees; null is insightface's Auto: 128 and 640, so that close-ups count."""

    _live: "FaceAnalysis | None" = PrivateAttr(None)

    @property
    def lineage(self) -> frozenset[str]:
        """See Scorer: packs hold networks of their own, and are known by the folder's name."""
        return frozenset({f"backbone: insightface {Path(self.model).expanduser().name}"})

    def fingerprint(self) -> str:
        """Hash the settings, insightface's version and the bytes of the ONNX files, without importing insightface."""
        decides = [self.faces, self.references, str(self.det_thresh), str(self.det_size_px)]
        decides += [version_of("insightface", "arcface"), content_hash(self._files())]
        return f"arcface-{VERSION}-{hashlib.sha256(' '.join(decides).encode()).hexdigest()[:16]}"

    def load(self, device: "torch.device") -> None:
        """Load detector and recogniser; raises ConfigError, saying what to download, when one is missing."""
        files = self._files()
        from insightface.app import FaceAnalysis
        from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, InvalidProtobuf

        providers = ["CUDAExecutionProvider"] if device.type == "cuda" else []
        folder, unreadable = files[0].parent, (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # insightface prints
                live = FaceAnalysis(
                    str(folder),
                    allowed_modules=["detection", "recognition"],
                    providers=[*providers, "CPUExecutionProvider"],
                )
        except (AssertionError, *unreadable, OSError, RuntimeError, ValueError) as error:
            raise self._wrong(f"{folder} cannot be loaded as a pack with a detector ({_brief(error)})") from error
        if "recognition" not in live.models:
            raise self._wrong(f"{folder} has a detector but no recogniser, such as w600k_r50.onnx")
        size = None if self.det_size_px is None else (self.det_size_px, self.det_size_px)
        live.prepare(ctx_id=0 if device.type == "cuda" else -1, det_thresh=self.det_thresh, det_size=size)
        running = live.models["recognition"].session.get_providers()
        say(f"scorer arcface: runs on {', '.join(running)}; licence of insightface's models: {_LICENCE}")
        self._live = live

    def find(self, bgr: np.ndarray) -> list[Face]:
        """Return the faces that insightface finds."""
        assert self._live is not None, "load() comes before score()"
        found = []
        for face in self._live.get(bgr):
            left, top, right, bottom = map(float, face.bbox)
            certainty = float(np.clip(face.det_score, 0, 1))
            found.append(Face((left, top, right, bottom), certainty, unit(face.embedding)))
        return found

    def _files(self) -> list[Path]:
        """Return the ONNX files; raises ConfigError for what insightface would download, or stop at an assertion."""
        local = Path(self.model).expanduser()
        folder = local if local.is_dir() else self.root.expanduser() / "models" / self.model
        if not folder.is_dir():
            raise self._wrong(f"there is no folder {folder}")
        if files := sorted(folder.glob("*.onnx")):
            return files
        nested = sorted({file.parent for file in folder.glob("*/*.onnx")})
        if nested:
            raise ConfigError(
                f"scorer arcface: the ONNX files are one folder too deep, in {nested[0]}: set model to that folder, "
                f"or move them up into {folder}"
            )
        raise self._wrong(f"{folder} holds no ONNX file")

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(
            f"scorer arcface: {what}; download a pack such as buffalo_l.zip from {_PAGE} and put its det_10g.onnx and "
            f"w600k_r50.onnx into a folder such as {self.root}/models/buffalo_l (licence: {_LICENCE})"
        )


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
