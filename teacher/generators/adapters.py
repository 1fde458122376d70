"""Low-rank adapters (LoRA, arXiv 2106.09685) on a frozen network, switched by name.

y = W x + up(down(x)); the scale is 1 (alpha = rank), as Lotus-2 is published. Several adapters
stay attached at once; the one in use is chosen between passes, so no weight is ever rewritten.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from teacher.errors import UsageError

SUFFIXES = {  # the two spellings in use -> which half
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
}


class Adapted(nn.Module):
    """A linear layer with named low-rank additions; ``active`` names the one in use."""

    def __init__(self, base: nn.Linear) -> None:
        """Wrap ``base``; its weight is left alone."""
        super().__init__()
        self.base, self.active = base, ""
        self.down, self.up = nn.ModuleDict(), nn.ModuleDict()

    def add(self, name: str, down: Tensor, up: Tensor) -> None:
        """Add ``down`` [r, in] and ``up`` [out, r] under ``name``."""
        for half, weight in ((self.down, down), (self.up, up)):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = nn.Parameter(weight.to(self.base.weight), requires_grad=False)
            half[name] = layer

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's answer plus the active adapter's."""
        y = self.base(x)
        if self.active in self.down:
            y = y + self.up[self.active](self.down[self.active](x))
        return y


def attach(network: nn.Module, tensors: Mapping[str, Tensor], *, name: str) -> None:
    """Attach the adapter of a LoRA file (keys ``transformer.PATH.lora_A.weight``) as ``name``.

    Raises `UsageError` for a key that fits nowhere, a missing half, or a wrong shape.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        suffix = next((s for s in SUFFIXES if key.endswith(s)), None)
        if suffix is None:
            raise UsageError(f"adapter {name}: key {key!r} is not a LoRA weight.")
        path = key.removeprefix("transformer.").removesuffix(suffix)
        halves.setdefault(path, {})[SUFFIXES[suffix]] = tensor
    if not halves:
        raise UsageError(f"adapter {name}: the file holds no weights.")
    for path, half in halves.items():
        try:
            layer = network.get_submodule(path)
        except AttributeError as error:
            raise UsageError(f"adapter {name}: the network has no layer {path!r}.") from error
        base = layer.base if isinstance(layer, Adapted) else layer
        if not isinstance(base, nn.Linear) or set(half) != {"down", "up"}:
            raise UsageError(f"adapter {name}: {path!r} needs a linear layer and two halves.")
        down, up = half["down"], half["up"]
        fits = (down.shape[1], up.shape[0]) == (base.in_features, base.out_features)
        if not fits or down.shape[0] != up.shape[1]:
            raise UsageError(
                f"adapter {name}: {path!r} has shapes {tuple(down.shape)}, {tuple(up.shape)}; "
                f"expected [r, {base.in_features}], [{base.out_features}, r]."
            )
        if not isinstance(layer, Adapted):
            layer = Adapted(base)
            parent, _, leaf = path.rpartition(".")
            network.get_submodule(parent)._modules[leaf] = layer
        layer.add(name, down, up)


def use_adapter(network: nn.Module, name: str) -> None:
    """From now on the passes of ``network`` use this adapter; "" means none."""
    for module in network.modules():
        if isinstance(module, Adapted):
            module.active = name


def check_complete(module: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Load ``tensors`` into ``module`` if names and shapes are exactly its own."""
    expected = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in tensors.items()}
    if expected != found:
        raise UsageError(f"{where}: found tensors {found}, expected {expected}.")
    module.load_state_dict(dict(tensors))
