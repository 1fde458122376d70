"""A TensorRT that has exactly the names of a real release, and no device behind them (no tests).

The names come from the real binding wheels (``data/trt_symbols.json``, made by
``benchmarks/trt_symbols.py``). A name that a release lacks raises AttributeError, as it would
there; what is done to the builder is recorded, and the "plan" is a text. So everything of ours
around the builder runs, for every release, where TensorRT itself cannot be installed.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import onnx

SYMBOLS = json.loads((Path(__file__).parent / "data" / "trt_symbols.json").read_text())
VERSIONS = tuple(SYMBOLS)


def names_of(version, kind):
    return set(SYMBOLS[version][kind].split())


class Thing:
    """An object of class ``kind``: only its real names exist; ``does`` says what they do."""

    def __init__(self, trt, kind, **does):
        self.__dict__.update(_trt=trt, _kind=kind, _does=does)

    def __getattr__(self, name):
        if name not in names_of(self._trt.__version__, self._kind):
            raise AttributeError(f"{self._kind} of {self._trt.__version__} has no {name}")
        if name in self._does:
            return self._does[name]
        return lambda *a, **k: self._trt.calls.append((self._kind, name, a, k))

    def __setattr__(self, name, value):
        if name not in names_of(self._trt.__version__, self._kind):
            raise AttributeError(f"{self._kind} of {self._trt.__version__} has no {name}")
        self._trt.calls.append((self._kind, name, (value,), {}))


class StubTensorRT:
    """The module. ``calls``: (class, name, args, kwargs) of everything that was done."""

    def __init__(self, version, *, plan=b"plan", parses=True):
        self.__version__, self.calls, self.plan, self.parses = version, [], plan, parses
        self.caches = []

    def __getattr__(self, name):
        if name.startswith("__") or name not in names_of(self.__version__, ""):
            raise AttributeError(f"tensorrt {self.__version__} has no {name}")
        if name == "ILogger":
            return object
        if name in ("Builder", "OnnxParser"):
            return getattr(self, f"_{name}")
        members = names_of(self.__version__, name)
        return SimpleNamespace(**{m: Member(name, m, i) for i, m in enumerate(sorted(members))})

    def _Builder(self, logger):
        self.logger = logger
        return Thing(
            self,
            "Builder",
            create_network=self._network,
            create_builder_config=lambda: Thing(
                self,
                "IBuilderConfig",
                create_timing_cache=self._cache,
                get_timing_cache=lambda: self.caches[-1],
            ),
            create_optimization_profile=lambda: Thing(self, "IOptimizationProfile"),
            build_serialized_network=lambda network, config: self.plan,
        )

    def _cache(self, data):
        self.calls.append(("ITimingCache", "from", (data,), {}))
        self.caches.append(Thing(self, "ITimingCache", serialize=lambda: data + b"+timed"))
        return self.caches[-1]

    def _network(self, flags):
        self.calls.append(("Builder", "create_network", (flags,), {}))
        self.network = Thing(self, "INetworkDefinition", num_inputs=0)
        return self.network

    def _OnnxParser(self, network, logger):
        def parse(path):
            inputs = onnx.load(path).graph.input
            tensors = []
            for item in inputs:
                dims = item.type.tensor_type.shape.dim
                shape = [d.dim_value if d.HasField("dim_value") else -1 for d in dims]
                tensors.append(Thing(self, "ITensor", name=item.name, shape=shape))
            network._does.update(num_inputs=len(tensors), get_input=lambda i: tensors[i])
            logger.log(Member("Severity", "WARNING", 0), "parsed")
            return self.parses

        error = Thing(
            self,
            "ParserError",
            desc=lambda: "no importer",
            node_name=lambda: "n1",
            node_operator=lambda: "Det",
        )
        return Thing(
            self,
            "OnnxParser",
            parse_from_file=parse,
            num_errors=1,
            get_error=lambda i: error,
        )


class Member(int):
    """An enum's member: an int with a name."""

    def __new__(cls, kind, name, value):
        made = int.__new__(cls, value)
        made.kind, made.name = kind, name
        return made
