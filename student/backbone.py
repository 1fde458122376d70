"""Any `timm` model that offers ``features_only``, as a pyramid of feature maps.

The contract with `timm` is ``features_only`` + ``feature_info`` and nothing else, so that a new
backbone is a new name in a YAML file. Plain vision transformers answer at one stride only; four of
their blocks, evenly spread, become the pyramid (Ranftl et al. 2021, "Vision Transformers for Dense
Prediction", section 3.1), their position embeddings made for the given size.
"""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


class StudentError(ValueError):
    """A student that cannot be built from what was asked for; the text says why. Exit 2."""

    exit_code = 2


class WeightsUnavailable(RuntimeError):
    """Pretrained weights that could not be fetched or read. Exit 3."""

    exit_code = 3


def _unknown_backbone(name: str) -> StudentError:
    near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3, cutoff=0.5)
    hint = f"; near it: {', '.join(near)}" if near else ""
    return StudentError(
        f"student backbone {name!r} is not a timm model{hint}. "
        "`python -c \"import timm; print(timm.list_models('*vit*'))\"` lists the names."
    )


def _create(name: str, *, pretrained: bool, weights: str, options: dict[str, Any]) -> Any:
    """`timm.create_model` with errors that say what to do."""
    overlay: dict[str, Any] = {}
    if weights:
        if not Path(weights).is_file():
            raise StudentError(f"backbone_weights={weights!r}: no such file")
        if not weights.endswith(".safetensors"):
            raise StudentError(
                f"backbone_weights={weights!r}: only .safetensors is read, never a pickle; convert "
                "it once with safetensors.torch.save_file(state_dict, path)"
            )
        overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": weights}}
    elif pretrained:
        overlay = {"pretrained": True}
    try:
        made = timm.create_model(name, features_only=True, **options, **overlay)
    except (
        RuntimeError,
        AttributeError,
        OSError,
        ValueError,
        AssertionError,
        SafetensorError,
    ) as error:
        if overlay:
            raise _unavailable(name, error, weights) from error
        raise StudentError(
            f"student backbone {name!r} cannot give feature maps (timm features_only): "
            f"{_said(error)}"
        ) from error
    if weights:
        _refuse_strangers(made, name, weights, options | overlay)
    return made


def _said(error: Exception) -> str:
    return str(error) or f"a bare {type(error).__name__}"


def _refuse_strangers(made: Any, name: str, weights: str, options: dict[str, Any]) -> None:
    """`StudentError` if kernels or matrices of ``made`` are chance and not from the file.

    `timm` loads feature maps leniently: a file of another model fills nothing. What is chance
    differs from seed to seed, whatever the file calls its tensors. Norms start as constants, so a
    file that lacks those alone is not told.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() + 1)
        again = timm.create_model(name, features_only=True, **options)
    pairs = zip(made.named_parameters(), again.parameters(), strict=True)
    chance = [key for (key, one), other in pairs if not torch.equal(one, other)]
    if chance:
        with safe_open(weights, framework="pt") as file:
            keys = list(file.keys())
        raise StudentError(
            f"backbone_weights={weights!r}: has nothing for {len(chance)} tensors of {name} "
            f"({', '.join(chance[:2])}, ...); found {', '.join(keys[:2])}, ...; expected that very "
            "model's weights in timm's layout"
        )


def _unavailable(name: str, error: Exception, weights: str) -> WeightsUnavailable:
    hint = (
        "Train from scratch with student.pretrained=false, or point student.backbone_weights at a "
        "local .safetensors file; HF_HUB_OFFLINE and HF_ENDPOINT are honoured."
    )
    if weights:
        hint = (
            f"It was read from {weights}. Where sizes do not fit, it is another model's file, or "
            "this model takes its weights at its own input size only (student.height and width)."
        )
    return WeightsUnavailable(
        f"weights for backbone {name!r} could not be loaded: {type(error).__name__}: {error}. "
        f"{hint}"
    )


def _licence_of(weights: str) -> str:
    """What a local .safetensors file says of its licence in its own metadata."""
    if not weights:
        return ""
    with safe_open(weights, framework="pt") as file:
        metadata = file.metadata() or {}
    return str(metadata.get("license") or metadata.get("licence") or "")


class Backbone(nn.Module):
    """Feature maps of a `timm` model, fine to coarse.

    Args:
        name: any name of ``timm.list_models()``, with or without a weight tag.
        height: fixed input height [px]; a multiple of the coarsest stride.
        width: fixed input width [px]; likewise.
        pretrained: fetch `timm`'s weights for this name (hub or cache).
        weights: a local .safetensors file instead; empty for none.
        licence: licence of that file; empty takes the file's own ``license`` entry, else `timm`'s
            record for that name.
        decoder_stride: what the size must be a multiple of besides [px].

    Attributes:
        channels: channels per level, fine to coarse.
        strides: stride of every level [px].
        sizes: (height, width) of every level.
        mean, std: what the weights expect of an RGB in [0, 1].
        licence: licence of the weights as `timm` records it ("" when trained from scratch).
    """

    def __init__(
        self,
        name: str,
        *,
        height: int,
        width: int,
        pretrained: bool = False,
        weights: str = "",
        licence: str = "",
        decoder_stride: int = 1,
    ) -> None:
        """Build the network; see the class for the arguments."""
        super().__init__()
        if not timm.is_model(name):
            raise _unknown_backbone(name)
        facts = timm.get_pretrained_cfg(name)
        options: dict[str, Any] = {}
        if facts is not None and facts.fixed_input_size:
            self._check_size(name, height, width, self.stride_of(name), decoder_stride)
            options["img_size"] = (height, width)
        probe = _create(name, pretrained=False, weights="", options=options)
        blocks = len(probe.feature_info.info)
        if len(set(probe.feature_info.reduction())) == 1 and blocks >= 4:
            options["out_indices"] = tuple(math.ceil(blocks * k / 4) - 1 for k in (1, 2, 3, 4))
        if pretrained or weights or "out_indices" in options:
            probe = _create(name, pretrained=pretrained, weights=weights, options=options)
        self.net = probe
        self.channels: list[int] = list(probe.feature_info.channels())
        self.strides: list[int] = list(probe.feature_info.reduction())
        self._check_size(name, height, width, max(self.strides), decoder_stride)
        self.channels_last = str(getattr(probe, "output_fmt", "NCHW")).endswith("NHWC")
        self.sizes = self._measured(name, height, width)
        self.mean = tuple(facts.mean) if facts else (0.485, 0.456, 0.406)
        self.std = tuple(facts.std) if facts else (0.229, 0.224, 0.225)
        recorded = (facts.license or "") if facts and (pretrained or weights) else ""
        self.licence = licence or _licence_of(weights) or recorded

    @staticmethod
    def stride_of(name: str) -> int:
        """The coarsest stride of a backbone [px], which its input size must be a multiple of."""
        if not timm.is_model(name):
            raise _unknown_backbone(name)
        probe: Any = timm.create_model(name, features_only=True)
        return max(probe.feature_info.reduction())

    @staticmethod
    def _check_size(name: str, height: int, width: int, stride: int, decoder_stride: int) -> None:
        step = math.lcm(stride, decoder_stride)
        if height % step or width % step or height < step or width < step:
            near = [max(step, round(v / step) * step) for v in (height, width)]
            raise StudentError(
                f"student size {height}x{width} (height x width): {name} with decoder_stride="
                f"{decoder_stride} needs multiples of {step} px; the nearest is height={near[0]} "
                f"width={near[1]}"
            )

    @torch.no_grad()
    def _measured(self, name: str, height: int, width: int) -> list[tuple[int, int]]:
        """Height and width of every level: some networks pad less than their strides promise."""
        learning = self.training
        try:
            levels = self.eval()(torch.zeros(1, 3, height, width))
        except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
            raise StudentError(
                f"student backbone {name!r} cannot look at pictures of {height}x{width} px (height "
                f"x width): {_said(error)}"
            ) from error
        finally:
            self.train(learning)
        return [(level.shape[-2], level.shape[-1]) for level in levels]

    def forward(self, image: Tensor) -> list[Tensor]:
        """Normalised image [B,3,H,W] -> features [B,C,H/stride,W/stride] per level."""
        features = self.net(image)
        if self.channels_last:
            features = [f.permute(0, 3, 1, 2).contiguous() for f in features]
        return list(features)


def resampled_positions(theirs: Backbone, mine: Backbone) -> dict[str, Tensor]:
    """Absolute position embeddings [1,N,C] of ``theirs`` at the input size of ``mine``, by name.

    Only those whose grid of patches differs. Bicubic over the grid, as `timm` does it for its own
    weights; class and register tokens stay. Tables of relative positions are not known here.
    """
    found: dict[str, Tensor] = {}
    here = dict(mine.named_parameters())
    for name, value in theirs.named_parameters():
        owner, _, last = name.rpartition(".")
        if last != "pos_embed" or value.ndim != 3 or name not in here:
            continue
        old, new = (
            getattr(getattr(net.get_submodule(owner), "patch_embed", None), "grid_size", None)
            for net in (theirs, mine)
        )
        if old is None or new is None or tuple(old) == tuple(new):
            continue
        tokens = value.shape[1] - math.prod(old)  # of class and registers
        resampled = timm.layers.resample_abs_pos_embed(
            value.detach(), new_size=list(new), old_size=list(old), num_prefix_tokens=tokens
        )
        if resampled.shape == here[name].shape:
            found[name] = resampled
    return found


def conv_block(inputs: int, outputs: int, *, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU: folds into one convolution in every runtime."""
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def upsampled(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, half-pixel centres, no antialias: the one resize every runtime agrees on."""
    if x.shape[-2:] == torch.Size(size):
        return x
    return nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
