"""Where public RGB-D data sets keep image, depth and camera, and what their numbers mean.

A layout knows three things of an image below a root: which files are images, the depth of one in
metres (NaN unknown, +inf sky), and its cameras. Facts: the data sets' own descriptions; nothing is
filled in, clipped or cropped here, that is the business of an evaluation protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from teacher.errors import EnvironmentFailure, UsageError
from teacher.generators.pairs import (
    K4,
    integers,
    pair_camera,
    pair_depth,
    pair_metres,
    positive,
    scaled,
)
from teacher.label import Camera

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One data set's layout.

    Attributes:
        images: glob patterns of the images, relative to the root.
        depth: image path -> the file with its depth (which may be missing).
        metres: (depth file, image path) -> float32 [h, w] z-depth, or [N, 3] points (x, y px of the
            image, z metres).
        camera: image path -> fx, fy, cx, cy of the image in its own pixels, if the data set says.
        depth_camera: the same of the depth file, where that is a camera of its own.
        licence: the data set's terms as commonly stated; "" not known.
    """

    images: tuple[str, ...]
    depth: Callable[[Path], Path]
    metres: Callable[[Path, Path], np.ndarray]
    camera: Callable[[Path], K4 | None] = lambda image: None
    depth_camera: Callable[[Path], K4 | None] = lambda image: None
    licence: str = ""


def size_of(image: Path) -> tuple[int, int]:
    """(width, height), from the header."""
    with Image.open(image) as opened:
        return opened.size


def camera_of(layout: Layout, image: Path) -> Camera | None:
    """The known camera of an image file."""
    k = layout.camera(image)
    if k is None:
        return None
    width, height = size_of(image)
    return Camera(fx=k[0], fy=k[1], cx=k[2], cy=k[3], width=width, height=height)


def _centred(focal_px: float, image: Path) -> K4:
    """A camera with its principal point in the middle of the image."""
    width, height = size_of(image)
    return focal_px, focal_px, (width - 1) / 2, (height - 1) / 2


def _renamed(image: Path, old: str, new: str, suffix: str | None = None) -> Path:
    """The path with the last folder named ``old`` called ``new``."""
    parts = list(image.parts)
    if old not in parts:
        return image.parent / f"no folder {old}"
    parts[len(parts) - 1 - parts[::-1].index(old)] = new
    path = Path(*parts)
    return path if suffix is None else path.with_suffix(suffix)


# -- NYU Depth v2, extracted (BTS: rgb_*, sync_depth_*; or rgb_*, depth_*) --------------------


def _nyu_depth(image: Path) -> Path:
    number = image.stem.removeprefix("rgb_")
    found = image.parent / f"sync_depth_{number}.png"
    return found if found.exists() else image.parent / f"depth_{number}.png"


# -- KITTI raw with the annotated depth ------------------------------------------------------


def _kitti_depth(image: Path) -> Path:
    """``DAY/DRIVE/image_02/data/N.png`` -> ``[train/]DRIVE/proj_depth/groundtruth/image_02``."""
    drive, number, camera = image.parents[2], image.with_suffix(".png").name, image.parents[1].name
    inner = Path("proj_depth/groundtruth") / camera / number
    root = drive.parents[1]
    places = [p / drive.name / inner for p in (root / "train", root / "val", root, drive.parent)]
    return next((p for p in places if p.exists()), places[0])


def _kitti_camera(image: Path) -> K4 | None:
    calibration = image.parents[3] / "calib_cam_to_cam.txt"
    if not calibration.exists():
        return None
    name = f"P_rect_{image.parents[1].name[-2:]}:"
    line = next((t for t in calibration.read_text().splitlines() if t.startswith(name)), None)
    if line is None:
        raise UsageError(f"{calibration}: no line {name!r}; expected KITTI's raw calibration file")
    p = [float(v) for v in line.split()[1:]]
    return p[0], p[5], p[2], p[6]


# -- DIODE ------------------------------------------------------------------------------------


def _diode_metres(path: Path, image: Path) -> np.ndarray:
    depth_m = positive(np.load(path, allow_pickle=False).squeeze())
    mask = np.load(path.with_name(f"{image.stem}_depth_mask.npy"), allow_pickle=False)
    return np.where(mask.squeeze() > 0, depth_m, np.nan).astype(np.float32)


# -- Hypersim: distance along the ray; the camera of its tone-mapped frames -------------------

HYPERSIM_FOCAL = 886.81 / 1024  # of the width; scenes with tilted lenses differ


def _hypersim_depth(image: Path) -> Path:
    folder = image.parent.name.replace("_final_preview", "_geometry_hdf5")
    return (
        image.parent.with_name(folder) / f"{'.'.join(image.name.split('.')[:2])}.depth_meters.hdf5"
    )


def _hypersim_metres(path: Path, image: Path) -> np.ndarray:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise EnvironmentFailure("layout hypersim: h5py is missing: pip install h5py") from error
    with h5py.File(path, "r") as file:
        ray_m = positive(file["dataset"][()])
    height, width = ray_m.shape
    camera = Camera.centred(HYPERSIM_FOCAL * width, width, height)
    return ray_m / np.linalg.norm(camera.rays(), axis=-1).astype(np.float32)


# -- Virtual KITTI 2 --------------------------------------------------------------------------


def _vkitti_camera(image: Path) -> K4 | None:
    table = image.parents[3] / "intrinsic.txt"
    if not table.exists():
        return None
    wanted = (int(image.stem.removeprefix("rgb_")), int(image.parent.name.removeprefix("Camera_")))
    for line in table.read_text().splitlines()[1:]:
        row = line.split()
        if row and (int(row[0]), int(row[1])) == wanted:
            fx, fy, cx, cy = (float(v) for v in row[2:6])
            return fx, fy, cx, cy
    raise UsageError(f"{table}: no row for frame {wanted[0]}, camera {wanted[1]}")


def _vkitti_depth(image: Path) -> Path:
    return _renamed(image, "rgb", "depth").with_name(f"depth_{image.stem.removeprefix('rgb_')}.png")


# -- ScanNet: colour and depth are two cameras ------------------------------------------------


def _scannet_camera(which: str) -> Callable[[Path], K4 | None]:
    def read(image: Path) -> K4 | None:
        path = image.parents[1] / "intrinsic" / f"intrinsic_{which}.txt"
        if not path.exists():
            return None
        k = np.loadtxt(path)
        return float(k[0, 0]), float(k[1, 1]), float(k[0, 2]), float(k[1, 2])

    return read


# -- TUM RGB-D: times instead of names --------------------------------------------------------

TUM_CAMERAS: dict[str, K4] = {
    "freiburg1": (517.3, 516.5, 318.6, 255.3),
    "freiburg2": (520.9, 521.0, 325.1, 249.7),
    "freiburg3": (535.4, 539.2, 320.1, 247.6),
}


def _tum_depth(image: Path) -> Path:
    """The depth image nearest in time, at most 20 ms away, as the benchmark's own tool pairs."""
    time = float(image.stem)
    others = list((image.parents[1] / "depth").glob("*.png"))
    nearest = min(others, key=lambda p: abs(float(p.stem) - time), default=None)
    if nearest is None or abs(float(nearest.stem) - time) > 0.02:
        return image.parents[1] / "depth" / f"no image within 20 ms of {image.stem}"
    return nearest


def _tum_camera(image: Path) -> K4 | None:
    name = image.parents[1].name
    return next((k for part, k in TUM_CAMERAS.items() if part in name), None)


# -- SUN RGB-D: three low bits moved to the top -----------------------------------------------


def _sun_metres(path: Path, image: Path) -> np.ndarray:
    raw = integers(path)
    millimetres = (raw >> 3) | (raw << 13)
    return positive(millimetres / np.float32(1000))


def _sun_depth(image: Path) -> Path:
    """The one file of the raw depth folder; its name need not be the image's."""
    found = sorted((image.parents[1] / "depth").glob("*.png"))
    return found[0] if len(found) == 1 else image.parents[1] / "depth" / image.name


def _sun_camera(image: Path) -> K4 | None:
    path = image.parents[1] / "intrinsics.txt"
    if not path.exists():
        return None
    k = np.array(path.read_text().split(), float)
    return float(k[0]), float(k[4]), float(k[2]), float(k[5])


NYU: K4 = (518.8579, 519.4696, 325.5824, 253.7362)
LAYOUTS: dict[str, Layout] = {
    "nyu": Layout(
        images=("**/rgb_*.jpg", "**/rgb_*.png"),
        depth=_nyu_depth,
        metres=scaled(1000),
        camera=lambda image: NYU,
    ),
    "kitti": Layout(
        licence="CC-BY-NC-SA-3.0",
        images=("*/*/image_0[23]/data/*.png", "*/*/image_0[23]/data/*.jpg"),
        depth=_kitti_depth,
        metres=scaled(256),
        camera=_kitti_camera,
    ),
    "diode": Layout(
        images=("**/scene_*/scan_*/*.png",),
        depth=lambda image: image.with_name(f"{image.stem}_depth.npy"),
        metres=_diode_metres,
        camera=lambda image: (886.81, 927.06, 512.0, 384.0),
    ),
    "hypersim": Layout(
        licence="CC-BY-SA-3.0",
        images=("**/images/*_final_preview/*.tonemap.jpg",),
        depth=_hypersim_depth,
        metres=_hypersim_metres,
        camera=lambda image: _centred(HYPERSIM_FOCAL * size_of(image)[0], image),
    ),
    "vkitti2": Layout(
        licence="CC-BY-NC-SA-3.0",
        images=("**/frames/rgb/Camera_*/rgb_*.jpg",),
        depth=_vkitti_depth,
        metres=scaled(100, sky=65535),
        camera=_vkitti_camera,
    ),
    "scannet": Layout(
        licence="ScanNet Terms of Use (non-commercial)",
        images=("*/color/*.jpg",),
        depth=lambda image: _renamed(image, "color", "depth", ".png"),
        metres=scaled(1000),
        camera=_scannet_camera("color"),
        depth_camera=_scannet_camera("depth"),
    ),
    "tum": Layout(
        licence="CC-BY-4.0",
        images=("**/rgb/*.png",),
        depth=_tum_depth,
        metres=scaled(5000),
        camera=_tum_camera,
    ),
    "sunrgbd": Layout(
        images=("**/image/*.jpg", "**/image/*.png"),
        depth=_sun_depth,
        metres=_sun_metres,
        camera=_sun_camera,
    ),
    "pairs": Layout(
        images=tuple(f"**/*{suffix}" for suffix in PICTURES),
        depth=pair_depth,
        metres=pair_metres,
        camera=pair_camera,
    ),
}


def layout_of(name: str) -> Layout:
    """A layout by name; `UsageError` lists those there are."""
    if name not in LAYOUTS:
        raise UsageError(f"layout={name!r}: there are {sorted(LAYOUTS)}.")
    return LAYOUTS[name]


def list_images(root: Path, layout: Layout) -> list[str]:
    """Image names relative to the root, sorted; depth pictures are not images."""
    found = {p for pattern in layout.images for p in root.glob(pattern)}
    return sorted(p.relative_to(root).as_posix() for p in found if ".depth." not in p.name)
