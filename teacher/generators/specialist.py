"""Feed-forward depth specialists through transformers: Depth Pro, Depth Anything V2.

Depth Pro (arXiv 2410.02073) gives inverse depth for an image of width 1 and focal length 1: with
the focal length in pixels, f, and the width W, depth = f / (raw W). A camera that is known (or read
from EXIF) is used; otherwise the field of view that the model itself estimates.
Depth Anything V2 (2406.09414): the metric checkpoints answer metres for the cameras they saw, the
relative ones affine disparity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teacher.errors import UsageError
from teacher.generators import Query
from teacher.generators.diffusion import check_choice
from teacher.generators.hub import Checkpoint, open_checkpoint
from teacher.generators.runtime import Execution, by_size, chunks, depth_answer
from teacher.label import Answer, Camera, Space, Task

NEAREST_INVERSE_M = 1e4  # Depth Pro's own limits: 0.1 mm ...
FARTHEST_INVERSE_M = 1e-4  # ... to 10 km; beyond them depth is unknown here
TRUSTED = ("known", "exif")  # sources of a camera that overrule the model's own estimate
FOCAL = ("camera", "model")
DEPTH_PRO_LICENCES = {"apple/DepthPro": "Apple AMLR (research only)"}
DEPTH_ANYTHING_LICENCES = {
    f"depth-anything/Depth-Anything-V2-{kind}{size}": licence
    for kind in ("", "Metric-Indoor-", "Metric-Outdoor-")
    for size, licence in (
        ("Small", "Apache-2.0"),
        ("Base", "CC-BY-NC-4.0"),
        ("Large", "CC-BY-NC-4.0"),
    )
}


class DepthProTeacher:
    """Metric depth by Depth Pro."""

    tasks = (Task.DEPTH,)
    spaces: Mapping[Task, Space] = MappingProxyType({Task.DEPTH: Space.METRIC})

    def __init__(
        self, *, checkpoint: str, focal: str, device: str, dtype: str, offload: str, pass_size: int
    ) -> None:
        """Load the checkpoint.

        Args:
            checkpoint: folder, ``owner/name`` or ``owner/name@revision``.
            focal: ``camera``: a known or EXIF focal length where there is one, else the model's;
                ``model``: always the model's.
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``.
            dtype: ``auto`` (float16 on a GPU), ``float32``, ``float16``, ``bfloat16``.
            offload: ``none``, ``model``, ``sequential``.
            pass_size: images per forward pass.
        """
        self.focal = check_choice("focal", focal, FOCAL)
        self.net = _Network(
            open_checkpoint(checkpoint, key="teacher.checkpoint", licences=DEPTH_PRO_LICENCES),
            model_type="depth_pro",
            options=(device, dtype, offload, pass_size),
        )
        self.max_side = 1536

    def describe(self) -> dict[str, Any]:
        """Checkpoint with its hash, and what is done with cameras."""
        return {"name": "depth_pro", "focal": self.focal, **self.net.describe(Space.METRIC)}

    def answer(self, queries: Sequence[Query], tasks: Sequence[Task]) -> list[dict[Task, Answer]]:
        """Depth in metres; ``extras`` say which focal length was used and where it came from."""
        answers: list[dict[Task, Answer]] = [{} for _ in queries]
        for few, found in self.net.passes(queries):
            fovs = found.field_of_view
            for place, index in enumerate(few):
                height, width = queries[index].image.shape[:2]
                fov_deg = None if fovs is None else float(fovs[place])
                focal_px, source = self._focal_px(queries[index].camera, width, fov_deg)
                raw = self.net.resized(found.predicted_depth[place], (height, width), "bilinear")
                depth_m = metres(raw, focal_px=focal_px, width=width)
                answers[index][Task.DEPTH] = depth_answer(
                    depth_m.cpu().numpy(),
                    space=Space.METRIC,
                    focal_px=round(focal_px, 3),
                    focal_source=source,
                )
        return answers

    def _focal_px(self, camera: Camera, width: int, fov_deg: float | None) -> tuple[float, str]:
        if self.focal == "camera" and camera.source in TRUSTED:
            return camera.fx, camera.source
        if fov_deg is not None and 0 < fov_deg < 180:
            return 0.5 * width / math.tan(math.radians(fov_deg) / 2), "model"
        return camera.fx, camera.source


def metres(raw: Tensor, *, focal_px: float, width: int) -> Tensor:
    """Depth Pro's canonical inverse depth [H, W] -> metres; NaN beyond 0.1 mm to 10 km."""
    inverse = raw * (width / focal_px)
    known = (inverse > FARTHEST_INVERSE_M) & (inverse <= NEAREST_INVERSE_M)
    return torch.where(known, 1 / inverse, torch.nan)


class DepthAnythingTeacher:
    """Metric depth or affine disparity by Depth Anything V2, as its checkpoint says."""

    tasks = (Task.DEPTH,)

    def __init__(
        self, *, checkpoint: str, device: str, dtype: str, offload: str, pass_size: int
    ) -> None:
        """Load the checkpoint; arguments as for `DepthProTeacher`."""
        self.net = _Network(
            open_checkpoint(checkpoint, key="teacher.checkpoint", licences=DEPTH_ANYTHING_LICENCES),
            model_type="depth_anything",
            options=(device, dtype, offload, pass_size),
        )
        config = self.net.model.config
        metric = config.depth_estimation_type == "metric"
        self.space = Space.METRIC if metric else Space.AFFINE_DISPARITY
        self.spaces = {Task.DEPTH: self.space}
        self.range_m = float(config.max_depth) if metric else None

    def describe(self) -> dict[str, Any]:
        """Checkpoint with its hash, and the range of its metres."""
        about = {"name": "depth_anything", "range_m": self.range_m, "camera": "not used"}
        return about | self.net.describe(self.space)

    def answer(self, queries: Sequence[Query], tasks: Sequence[Task]) -> list[dict[Task, Answer]]:
        """Depth in metres (bounded by the checkpoint's range) or affine disparity."""
        answers: list[dict[Task, Answer]] = [{} for _ in queries]
        for few, found in self.net.passes(queries):
            for place, index in enumerate(few):
                size = queries[index].image.shape[:2]
                values = self.net.resized(found.predicted_depth[place], size, "bicubic")
                if self.space is Space.METRIC:  # bicubic can overshoot zero at an edge
                    values = torch.where(values > 0, values, torch.nan)
                answers[index][Task.DEPTH] = depth_answer(values.cpu().numpy(), space=self.space)
        return answers


class _Network:
    """A depth model of transformers with its own image processor."""

    def __init__(self, checkpoint: Checkpoint, *, model_type: str, options: tuple) -> None:
        device, dtype, offload, pass_size = options
        self.execution = Execution.parse(
            device=device, dtype=dtype, offload=offload, pass_size=pass_size, auto="float16"
        )
        self.checkpoint = checkpoint
        found = checkpoint.config("config.json").get("model_type")
        if found != model_type:
            raise UsageError(
                f"teacher.checkpoint: {checkpoint.repo} is a {found!r} model, expected "
                f"{model_type!r} in the layout of transformers."
            )
        model, self.processor = _load(checkpoint)
        self.model: Any = self.execution.settle(model)

    def describe(self, space: Space) -> dict[str, Any]:
        import transformers

        return {
            "model": self.checkpoint.describe(),
            "answers": str(space),
            "transformers": transformers.__version__,
            **self.execution.describe(),
        }

    @torch.no_grad()
    def passes(self, queries: Sequence[Query]) -> Any:
        """Yield (indices, the model's output) for images of one size, a pass at a time."""
        run = self.execution
        for group in by_size(queries):
            for part in chunks(len(group), run.pass_size):
                few = group[part]
                images = [torch.from_numpy(queries[i].image).permute(2, 0, 1) for i in few]
                pixels = self.processor(
                    images=images, return_tensors="pt", input_data_format="channels_first"
                ).pixel_values
                with run.using(self.model) as model:
                    yield few, model(pixel_values=pixels.to(run.device, run.dtype))

    def resized(self, raw: Tensor, size: tuple[int, ...], mode: str) -> Tensor:
        """[h, w] -> float32 [H, W] on the same extent, as the model's authors resample it."""
        return F.interpolate(raw.float()[None, None], tuple(size), mode=mode)[0, 0]


def _load(checkpoint: Checkpoint) -> tuple[nn.Module, Any]:
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    try:
        model = AutoModelForDepthEstimation.from_pretrained(
            checkpoint.folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
        processor = AutoImageProcessor.from_pretrained(checkpoint.folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise UsageError(
            f"teacher.checkpoint: {checkpoint.repo} cannot be loaded "
            f"({type(error).__name__}: {error})."
        ) from error
    return model, processor
