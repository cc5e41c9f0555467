"""What judges of identity share: which face counts, how it is compared to the references, and why one cannot be."""

import hashlib
import importlib.metadata
import importlib.util
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field, PrivateAttr

from diffusion_dpo.config import ConfigError
from diffusion_dpo.scorers import Metric, Need, Scorer, ScoreRequest, Scores

if TYPE_CHECKING:
    from PIL import Image

Policy = Literal["largest", "center", "best_match", "single_only"]
Aggregate = Literal["mean", "max", "centroid"]
NO_FACE = "no face in the image"
NO_REFERENCE_FACE = "no face in the reference"
NO_DIRECTION = "the embeddings of the faces are zero or cancel each other, so that there is no cosine"
_MAX_CACHED_REFERENCES = 256
_SHORTEST = 1e-6
"""Below this length a vector has no direction: what is left is rounding."""


@dataclass(frozen=True)
class Face:
    """A face that was found."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom in px."""
    score: float
    """How sure the detector is, 0 to 1."""
    embedding: np.ndarray
    """Shape (D,), float64, of length 1; zeros where the recogniser gave nothing that has a direction."""

    def area(self, size: tuple[int, int]) -> float:
        """Return its share of an image of (width, height), 0 to 1; what sticks out of the image does not count."""
        width = max(0.0, min(self.box[2], size[0]) - max(self.box[0], 0.0))
        height = max(0.0, min(self.box[3], size[1]) - max(self.box[1], 0.0))
        return width * height / (size[0] * size[1])


def unit(vector: np.ndarray) -> np.ndarray:
    """Return the vector as float64 with length 1, or zeros if it has no direction."""
    flat = np.asarray(vector, np.float64).ravel()
    length = float(np.linalg.norm(flat))
    return flat / length if _SHORTEST < length < np.inf else np.zeros_like(flat)


def similarity(face: Face, references: Sequence[Face], how: Aggregate) -> float:
    """Return the cosine to the references: the mean or largest of them, or that to the centre of the references.

    NaN where one of the vectors has no direction.
    """
    embeddings = np.stack([reference.embedding for reference in references])
    if how == "centroid":
        embeddings = unit(embeddings.mean(0))[None]
    if not face.embedding.any() or not embeddings.any(1).all():
        return float("nan")
    cosines = embeddings @ face.embedding
    return float(np.clip(cosines.max() if how == "max" else cosines.mean(), -1, 1))


def choose(
    faces: Sequence[Face],
    policy: Policy,
    size: tuple[int, int],
    references: Sequence[Face] = (),
    how: Aggregate = "mean",
) -> Face | str:
    """Return the face of an image of (width, height) that counts, or why there is none."""
    if not faces:
        return NO_FACE
    if policy == "single_only" and len(faces) > 1:
        return f"{len(faces)} faces in the image, and faces=single_only"
    if policy == "center":
        return min(faces, key=lambda face: _off_center(face, size))
    if policy == "best_match" and references:
        return max(faces, key=lambda face: np.nan_to_num(similarity(face, references, how), nan=-np.inf))
    return max(faces, key=lambda face: face.area(size))


def _off_center(face: Face, size: tuple[int, int]) -> float:
    left, top, right, bottom = face.box
    return float(np.hypot((left + right - size[0]) / 2, (top + bottom - size[1]) / 2))


_OPENCV = ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")
_DISTRIBUTIONS = {"cv2": _OPENCV}


def version_of(module: str, scorer: str) -> str:
    """Return a module's version without importing it; raises ConfigError, saying how to install it.

    It is that of whichever distribution brings the module: cv2 comes as opencv-python, as its headless one and so on.
    """
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"scorer {scorer} needs the module {module}: pip install 'diffusion-dpo[face]'")
    for name in _DISTRIBUTIONS.get(module, (module,)):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return str(importlib.import_module(module).__version__)  # built by hand, or a system's package


class FaceJudge(Scorer):
    """Cosine of the face in the image and those in the references; a kind of detector and recogniser says which."""

    extra = "face"
    prefix: ClassVar[str]
    """Beginning of the metrics' names."""

    faces: Policy = "largest"
    """Which of several faces counts. largest; center: nearest to the middle; best_match: most like the references
    (more faces, more chances); single_only: NaN unless there is exactly one. Of a reference, it is the largest."""
    references: Aggregate = "mean"
    """Of several references: the mean or the max of the cosines, or the cosine to their centroid."""
    det_thresh: float = Field(0.5, gt=0, lt=1)
    """How sure the detector must be of a face."""

    _known: OrderedDict[str, Face | None] = PrivateAttr(default_factory=OrderedDict)

    @property
    def needs(self) -> frozenset[Need]:
        """Reference images with a face."""
        return frozenset({"reference"})

    @property
    def lineage(self) -> frozenset[str]:
        """See Scorer: recognisers of one kind."""
        return frozenset({f"backbone: {self.prefix}"})

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The cosine; the number of faces; certainty and share of the image of the face that counts."""
        return (
            Metric(self.prefix, higher_is_better=True, range=(-1.0, 1.0)),
            Metric(f"{self.prefix}_n_faces", higher_is_better=True, range=(0.0, float("inf")), auxiliary=True),
            Metric(f"{self.prefix}_det_score", higher_is_better=True, range=(0.0, 1.0), auxiliary=True),
            Metric(f"{self.prefix}_face_area", higher_is_better=True, range=(0.0, 1.0), auxiliary=True),
        )

    def find(self, bgr: np.ndarray) -> list[Face]:
        """Return the faces of an image: uint8 of shape (height, width, 3), blue first."""
        raise NotImplementedError

    def score(self, batch: Sequence[ScoreRequest]) -> Scores:
        """Return the cosine, NaN with the reason without a face here or in any reference; n_faces is a number always.

        References without a face that can be compared are left out as long as another has one. Where no face counts
        because there are too many (`faces: single_only`), certainty and area are those of the largest.
        """
        rows, reasons = zip(*(self._judge(request) for request in batch), strict=True)
        values = np.array(rows, np.float64)
        return Scores({metric.name: values[:, i] for i, metric in enumerate(self.metrics)}, reasons)

    def _judge(self, request: ScoreRequest) -> tuple[tuple[float, float, float, float], str]:
        nan = float("nan")
        size = request.image.size
        found = [face for face in map(self._reference, request.references) if face is not None]
        references = [face for face in found if face.embedding.any()]
        faces = self.find(_bgr(request.image))
        face = choose(faces, self.faces, size, references, self.references)
        if isinstance(face, str):
            largest = choose(faces, "largest", size)
            certainty, area = (nan, nan) if isinstance(largest, str) else (largest.score, largest.area(size))
            return (nan, len(faces), certainty, area), face
        cosine = similarity(face, references, self.references) if references else nan
        reason = NO_REFERENCE_FACE if not found else NO_DIRECTION if np.isnan(cosine) else ""
        return (cosine, len(faces), face.score, face.area(size)), reason

    def _reference(self, image: "Image.Image") -> Face | None:
        pixels = _bgr(image)
        key = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
        if key not in self._known:
            face = choose(self.find(pixels), "largest", image.size)
            self._known[key] = None if isinstance(face, str) else face
            if len(self._known) > _MAX_CACHED_REFERENCES:
                self._known.popitem(last=False)
        return self._known[key]


def _bgr(image: "Image.Image") -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
