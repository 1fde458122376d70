"""The student: one image, one pass, every task asked for.

image float [B,3,H,W] sRGB in [0, 1] -> normalise -> backbone -> decoder -> heads. The network is
the same in training, in PyTorch and in the exported graph; mean and std are buffers in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from student.backbone import Backbone, StudentError
from student.decoder import Decoder
from student.depth_heads import DEPTH_HEADS
from student.dpt import DptDecoder
from student.heads import InstancesHead, NormalsHead, SemanticHead
from student.kinds import wrong_kind

TASKS = ("depth", "normals", "semantic", "instances")
NEAREST = 1e-3  # canonical metres that a calibrated depth cannot go below
LARGEST = {"depth_uncertainty": 20.0, "normals_uncertainty": 180.0}
FACTORS = {  # of a fitted uncertainty, beside its own map (`log_factors`)
    "depth_uncertainty": ("depth", "rise", "drop"),
    "normals_uncertainty": ("spread", "slant", "depth_uncertainty"),
}
LEAST = 1e-6  # of an uncertainty, in its unit
LEVEL = 0.01  # rise, drop (log depth) and spread below it count as this: no edge, no crease
DECODERS = {"fpn": Decoder, "dpt": DptDecoder}


def assumed_focal_px(height: int, width: int) -> float:
    """Focal length of a 60 degree view across the longer side: the default canonical camera."""
    return max(height, width) / 2 / math.tan(math.radians(60) / 2)


def log_factors(name: str, answer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logs of the maps that a fitted uncertainty is a product of powers of, [B,1,H,W] each.

    Its own comes first, then those of `FACTORS` that the answer has:

    * ``depth``, canonical metres; ``rise`` and ``drop``, in log depth from here to the farthest and
      to the nearest of the 3x3 pixels around: on a wall one or both are small, between two surfaces
      neither is.
    * ``spread``, 1 - |mean| of the 3x3 normals around (Mardia & Jupp 2000, "Directional
      Statistics", chapter 9: one minus their mean resultant length); ``slant``, exp(n_z), smallest
      where a surface faces the camera; ``depth_uncertainty``.

    Our own choice, compared with others in docs/results.md.
    """
    found = {name: answer[name].clamp(min=LEAST).log()}
    if name == "depth_uncertainty":
        log_depth = answer["depth"].log()
        near = -nn.functional.max_pool2d(-log_depth, 3, stride=1, padding=1)
        far = nn.functional.max_pool2d(log_depth, 3, stride=1, padding=1)
        found["depth"] = log_depth
        found["rise"] = (far - log_depth).clamp(min=LEVEL).log()
        found["drop"] = (log_depth - near).clamp(min=LEVEL).log()
        return found
    normals = answer["normals"]
    mean = nn.functional.avg_pool2d(normals, 3, stride=1, padding=1, count_include_pad=False)
    found["spread"] = (1 - mean.norm(dim=1, keepdim=True)).clamp(min=LEVEL).log()
    found["slant"] = normals[:, 2:]
    if "depth_uncertainty" in answer:
        found["depth_uncertainty"] = answer["depth_uncertainty"].clamp(min=LEAST).log()
    return found


def _class_table(classes: Mapping[Any, str] | None) -> dict[str, str]:
    table = {int(k): str(v) for k, v in (classes or {}).items()}
    return {str(k): table[k] for k in sorted(table)}


class Student(nn.Module):
    """A `timm` backbone with a light decoder and one head per task.

    Args:
        backbone: any `timm` model with ``features_only``.
        tasks: any of `TASKS`; depth brings ``sky`` along.
        height: fixed input height [px].
        width: fixed input width [px].
        canonical_focal_px: f_c of the canonical camera [px at this input size]; None means a
            60 degree view across the longer side. D = depth * f / f_c for an image of focal f.
        classes: class id -> name, needed for ``semantic``; logits are in order of the ids.
        decoder: ``fpn``, light, or ``dpt``, wider and without the image's own detail.
        decoder_channels: channels at the decoder's output stride.
        decoder_stride: 2 or 4; the heads' sub-pixels do the rest.
        depth_head: ``step``, ``log``, ``bins`` or ``mixture`` (`student.depth_heads`).
        uncertainty: whether each task also predicts its uncertainty.
        calibration: constants fitted to truth after training: ``depth`` [a, b] for a depth + b
            (canonical metres), ``TASK_uncertainty`` [g, p, ...] for g times powers p, ... of
            the factors of `log_factors`, the last of which may be left out.
        pretrained: start from `timm`'s weights of that name.
        backbone_weights: or from a local .safetensors file.
        backbone_licence: licence of that file; "" takes what the file or `timm` says.

    Attributes:
        config: plain JSON that rebuilds this very network: ``Student(**model.config)``.
        class_ids: class id of every semantic logit channel.
        provenance: plain JSON; filled by the trainer and `student.checkpoint`.

    Raises:
        StudentError: a value of the wrong kind, unknown backbone or task, impossible size.
    """

    def __init__(
        self,
        *,
        backbone: str = "mobilenetv4_conv_small",
        tasks: Sequence[str] = ("depth", "normals"),
        height: int,
        width: int,
        canonical_focal_px: float | None = None,
        classes: Mapping[Any, str] | None = None,
        decoder: str = "fpn",
        decoder_channels: int = 32,
        decoder_stride: int = 2,
        depth_head: str = "step",
        uncertainty: bool = True,
        calibration: Mapping[str, Sequence[float]] | None = None,
        pretrained: bool = False,
        backbone_weights: str | None = "",
        backbone_licence: str | None = "",
    ) -> None:
        """Build the network; see the class for the arguments."""
        wrong = wrong_kind(type(self).__init__, locals(), where="student.")
        if wrong is not None:
            raise StudentError(wrong)
        super().__init__()
        focal_px = canonical_focal_px
        if focal_px is None:
            focal_px = assumed_focal_px(height, width)
        self.config: dict[str, Any] = {
            "backbone": backbone,
            "tasks": [t for t in TASKS if t in tasks],
            "height": int(height),
            "width": int(width),
            "canonical_focal_px": float(focal_px),
            "classes": _class_table(classes) if "semantic" in tasks else {},
            "decoder": str(decoder),
            "decoder_channels": int(decoder_channels),
            "decoder_stride": int(decoder_stride),
            "depth_head": str(depth_head),
            "uncertainty": bool(uncertainty),
            "calibration": {k: [float(x) for x in v] for k, v in (calibration or {}).items()},
        }
        self._check(tasks)
        self.tasks: tuple[str, ...] = tuple(self.config["tasks"])
        self.canonical_focal_px = float(focal_px)
        self.class_ids = [int(k) for k in self.config["classes"]]
        self.provenance: dict[str, Any] = {}
        self.backbone = Backbone(
            backbone,
            height=height,
            width=width,
            pretrained=pretrained,
            weights=backbone_weights or "",
            licence=backbone_licence or "",
            decoder_stride=decoder_stride,
        )
        self.register_buffer("mean", torch.tensor(self.backbone.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(self.backbone.std).view(1, 3, 1, 1))
        self.mean: Tensor
        self.std: Tensor
        self.decoder: nn.Module = DECODERS[decoder](
            channels=self.backbone.channels,
            strides=self.backbone.strides,
            sizes=self.backbone.sizes,
            height=height,
            width=width,
            stride=decoder_stride,
            base=decoder_channels,
        )
        self.heads = nn.ModuleDict({task: self._head(task) for task in self.tasks})

    def _check(self, tasks: Sequence[str]) -> None:
        for name in ("height", "width"):
            if self.config[name] < 1:
                raise StudentError(f"student {name}={self.config[name]}: expected at least 1 px")
        if not tasks or any(task not in TASKS for task in tasks):
            raise StudentError(f"student tasks {list(tasks)}: expected some of {list(TASKS)}")
        if "semantic" in tasks and len(self.config["classes"]) < 2:
            raise StudentError(
                "student task 'semantic' needs classes={id: name} with at least two entries, got "
                f"{self.config['classes']}"
            )
        for name, known in (("decoder", DECODERS), ("depth_head", DEPTH_HEADS)):
            if self.config[name] not in known:
                raise StudentError(f"student {name}={self.config[name]!r}: expected {list(known)}")
        most = {"depth": 2}
        if self.config["uncertainty"]:
            most |= {name: 2 + len(others) for name, others in FACTORS.items()}
            most["normals_uncertainty"] -= "depth" not in tasks
        most = {k: n for k, n in most.items() if k.removesuffix("_uncertainty") in tasks}
        for name, numbers in self.config["calibration"].items():
            if not 2 <= len(numbers) <= most.get(name, 0) or not all(map(math.isfinite, numbers)):
                raise StudentError(
                    f"student calibration: {name}={numbers}, expected two finite numbers or more "
                    f"for some of these, at most so many: {most}"
                )
        stride, base = self.config["decoder_stride"], self.config["decoder_channels"]
        if stride not in (2, 4) or base < 8:
            raise StudentError(
                f"student decoder: stride must be 2 or 4 and channels at least 8, got stride="
                f"{stride} channels={base}"
            )
        if not (math.isfinite(self.config["canonical_focal_px"])) or (
            self.config["canonical_focal_px"] <= 0
        ):
            raise StudentError(
                f"canonical_focal_px must be positive, got {self.config['canonical_focal_px']}"
            )

    def _head(self, task: str) -> nn.Module:
        inputs, stride = self.config["decoder_channels"], self.config["decoder_stride"]
        uncertainty = self.config["uncertainty"]
        if task == "depth":
            head = DEPTH_HEADS[self.config["depth_head"]]
            return head(inputs, stride=stride, uncertainty=uncertainty)
        if task == "normals":
            return NormalsHead(inputs, stride=stride, uncertainty=uncertainty)
        if task == "instances":
            diagonal_px = math.hypot(self.config["height"], self.config["width"])
            return InstancesHead(inputs, stride=stride, diagonal_px=diagonal_px)
        return SemanticHead(
            inputs, stride=stride, classes=len(self.class_ids), uncertainty=uncertainty
        )

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Answer every task at the image's own resolution.

        Args:
            image: [B,3,H,W] sRGB in [0, 1], H and W as configured.

        Returns:
            ``depth`` [B,1,H,W] canonical metres, positive and finite; ``sky`` [B,1,H,W] logits;
            ``depth_uncertainty`` [B,1,H,W] Laplace scale b of log depth; ``normals`` [B,3,H,W]
            unit vectors; ``normals_uncertainty`` [B,1,H,W] expected angle in degrees; ``semantic``
            [B,C,H,W] logits; ``semantic_uncertainty`` [B,1,H,W] 1 - p; ``center`` [B,1,H,W] score
            and ``offset`` [B,2,H,W] px (right, down) to the own instance's centre. Only what was
            asked for; a depth head may add the distribution that it is taught by.
        """
        x = (image - self.mean) / self.std
        features = self.backbone(x)
        x = self.decoder(x, features)
        answer: dict[str, Tensor] = {}
        for head in self.heads.values():
            answer.update(head(x))
        fitted = {}
        for name, (first, *powers) in self.config["calibration"].items():
            if name == "depth":
                fitted[name] = (first * answer[name] + powers[0]).clamp(min=NEAREST)
            else:
                logs = zip(log_factors(name, answer).values(), powers, strict=False)
                # one exp each: a sum of logs might be taken for one worth eight bits
                product = math.prod(((p * log).exp() for log, p in logs), start=first)
                fitted[name] = product.clamp(max=LARGEST[name])
        return answer | fitted
