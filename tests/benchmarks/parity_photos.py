"""An export's artefacts against its torch student on photographs without any labels.

python tests/benchmarks/parity_photos.py EXPORT PHOTOS      (docs/results.md, "Export")
"""

import sys
from pathlib import Path

import numpy as np
import torch

from export.delivery import REFERENCE
from export.letterbox import Letterbox
from export.parity import TIE, UNITS, margin, measures, summarise
from export.runtimes import open_runtime
from teacher.images import ImageError, read

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def main():
    export, photos = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    names = sorted(p for p in photos.rglob("*") if p.suffix.lower() in SUFFIXES)
    with open_runtime(export / REFERENCE, threads=1) as student:
        size = (student.card.height, student.card.width)
        answers, images, keys = [], [], []
        for path in names:
            try:
                picture = read(path.read_bytes())
            except ImageError as error:
                print(f"{path.name}: {error}")
                continue
            box = Letterbox.fit(picture.image.shape[:2], size)
            camera = picture.camera
            focal_px = np.array([box.focal_px(camera.fx, camera.fy)], np.float32)
            images.append((box.apply(picture.image)[None], focal_px))
            answers.append(student(*images[-1]))
            keys.append(path.name)
    print(f"{len(keys)} photographs at {size[0]}x{size[1]}")
    for file in sorted(export.glob("*.onnx")):
        rows = {}
        with open_runtime(file, threads=1, rounding=True) as artefact:
            for key, image, expected in zip(keys, images, answers, strict=True):
                found = artefact(*image)
                ties = None
                if "semantic_logits" in expected:
                    ties = margin(expected["semantic_logits"])[0] < TIE
                for name in found:
                    own = ties if name == "semantic" else None
                    row = measures(name, found[name][0], expected[name][0], own)
                    rows.setdefault(name, []).append((key, row))
        for name, listed in rows.items():
            told = {k: v for k, v in summarise(listed).items() if isinstance(v, float)}
            numbers = ", ".join(f"{k} {v:.2g}" for k, v in told.items())
            print(f"{file.name} {name} [{UNITS[name]}]: {numbers}")


if __name__ == "__main__":
    main()
