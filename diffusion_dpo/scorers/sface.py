"""SFace as a judge of identity, through OpenCV: the second judge, whose weights may be used commercially."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import PrivateAttr

from diffusion_dpo.config import ConfigError
from diffusion_dpo.scorers.faces import Face, FaceJudge, unit, version_of
from diffusion_dpo.scorers.weights import content_hash

if TYPE_CHECKING:
    import torch
    from cv2 import FaceDetectorYN, FaceRecognizerSF

VERSION = 2
"""Raise it when a change of this file or of faces.py changes the values."""
_PAGE = "https://github.com/opencv/opencv_zoo"


class SFace(FaceJudge):
    """Cosine of SFace embeddings (`sface`, -1 to 1) of the faces in the image and in its references; on the CPU.

    Known biases: those of `arcface`; the model is smaller and tells people apart worse, and its cosines are on another
    scale, so that thresholds of one do not hold for the other.
    """

    licence = "YuNet: MIT; SFace: Apache-2.0"
    source = "Zhong et al. 2021, arXiv 2205.12010; YuNet: Wu et al. 2023, doi 10.1007/s11633-023-1423-y"
    weights = "face_detection_yunet_2023mar.onnx and face_recognition_sface_2021dec.onnx of OpenCV's zoo"
    prefix = "sface"

    detector_path: Path = Path("face_detection_yunet_2023mar.onnx")
    """YuNet's ONNX file."""
    recognizer_path: Path = Path("face_recognition_sface_2021dec.onnx")
    """SFace's ONNX file."""

    _live: "tuple[FaceDetectorYN, FaceRecognizerSF] | None" = PrivateAttr(None)

    def fingerprint(self) -> str:
        """Hash the settings, OpenCV's version and the bytes of both files, without importing OpenCV."""
        decides = [self.faces, self.references, str(self.det_thresh), version_of("cv2", "sface")]
        decides.append(content_hash(self._files()))
        return f"sface-{VERSION}-{hashlib.sha256(' '.join(decides).encode()).hexdigest()[:16]}"

    def load(self, device: "torch.device") -> None:
        """Load detector and recogniser; raises ConfigError, saying what to download, when one is missing."""
        detector, recognizer = map(str, self._files())
        import cv2

        try:
            self._live = (
                cv2.FaceDetectorYN.create(detector, "", (320, 320), score_threshold=self.det_thresh),
                cv2.FaceRecognizerSF.create(recognizer, ""),
            )
        except cv2.error as error:
            raise ConfigError(
                f"scorer sface: OpenCV cannot read {detector} or {recognizer} ({' '.join(str(error).split())[:200]}); "
                f"download them again from {_PAGE}"
            ) from error

    def find(self, bgr: np.ndarray) -> list[Face]:
        """Return the faces that YuNet finds."""
        assert self._live is not None, "load() comes before score()"
        detector, recognizer = self._live
        detector.setInputSize((bgr.shape[1], bgr.shape[0]))
        _, rows = detector.detect(bgr)
        found = []
        for row in rows if rows is not None else ():
            left, top, width, height = map(float, row[:4])
            feature = recognizer.feature(recognizer.alignCrop(bgr, row))
            box = (left, top, left + width, top + height)
            found.append(Face(box, float(np.clip(row[14], 0, 1)), unit(feature)))
        return found

    def _files(self) -> list[Path]:
        files = [self.detector_path.expanduser(), self.recognizer_path.expanduser()]
        for name, file in zip(("detector_path", "recognizer_path"), files, strict=True):
            if not file.is_file():
                raise ConfigError(
                    f"scorer sface: {name}={file} is not a file; download {self.weights} from {_PAGE} and set "
                    "detector_path and recognizer_path (licence: MIT and Apache-2.0)"
                )
        return files
