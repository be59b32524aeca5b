"What several test files need."
from __future__ import annotations
import shutil
from pathlib import Path

SAMPLE = Path(__file__).resolve().parent/'images'/'cifar10-sample.tar.xz'


def unpack_sample(folder: str | Path) -> Path:
    "Unpack 2,000 real CIFAR-10 images, 150 + 50 a class, as `train/<class>/*.jpg` and `test/<class>/*.jpg`; returns `folder`."
    folder = Path(folder)
    shutil.unpack_archive(SAMPLE, folder)
    return folder
