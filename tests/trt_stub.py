"""A TensorRT that has exactly the names of a real release, and no device behind them (no tests).

The names come from the real binding wheels (``data/trt_symbols.json``, made by
``benchmarks/trt_symbols.py``). A name that a release lacks raises AttributeError, as it would
there; what is done to the builder is recorded, and the "plan" is a text. So everything of ours
around the builder runs, for every release, where TensorRT itself cannot be installed.

A stub made with ``plan=`` an ONNX file's bytes also runs it: ``deserialize_cuda_engine`` reads the
graph, ``execute_async_v3`` computes it in ONNX Runtime on the memory of `FakeCuda`. So what is ours
around an engine runs, too: profiles, names, types, buffers, filling up, splitting.
"""

import ctypes
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort

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

    def __init__(self, version, *, plan=b"plan", parses=True, profile=(1, 1, 8), spoil=None):
        self.__version__, self.calls, self.plan, self.parses = version, [], plan, parses
        self.profile, self.spoil = profile, spoil  # batches; spoil(outputs) makes it miscompiled
        self.caches = []

    def __getattr__(self, name):
        if name.startswith("__") or name not in names_of(self.__version__, ""):
            raise AttributeError(f"tensorrt {self.__version__} has no {name}")
        if name in ("ILogger", "IProfiler"):
            return object
        if name in ("Builder", "OnnxParser", "Runtime"):
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

    def _Runtime(self, logger):
        return Thing(self, "Runtime", deserialize_cuda_engine=self._engine)

    def _engine(self, data):
        try:
            graph = onnx.load_from_string(data).graph
        except Exception:  # protobuf's own classes
            return None  # what TensorRT does
        tensors = {i.name: i for i in (*graph.input, *graph.output)}
        types = {1: "FLOAT", 2: "UINT8", 6: "INT32", 7: "INT64", 10: "HALF", 11: "DOUBLE"}
        fed = [i.name for i in graph.input]

        def shape(name):
            dims = tensors[name].type.tensor_type.shape.dim
            return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)

        return Thing(
            self,
            "ICudaEngine",
            num_io_tensors=len(tensors),
            get_tensor_name=lambda i: list(tensors)[i],
            get_tensor_mode=lambda n: getattr(self.TensorIOMode, "INPUT" if n in fed else "OUTPUT"),
            get_tensor_dtype=lambda n: SimpleNamespace(
                name=types[tensors[n].type.tensor_type.elem_type]
            ),
            get_tensor_shape=shape,
            get_tensor_profile_shape=lambda n, i: [(b, *shape(n)[1:]) for b in self.profile],
            create_execution_context=lambda: self._context(data, fed, list(tensors)),
        )

    def _context(self, data, fed, names):
        kinds = {"float": "f4", "float16": "f2", "uint8": "u1", "int32": "i4", "int64": "i8"}
        shapes, addresses = {}, {}

        def set_input_shape(name, shape):
            shapes[name] = shape
            return self.profile[0] <= shape[0] <= self.profile[2]

        def execute(stream):
            session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
            types = {i.name: kinds[i.type[7:-1]] for i in session.get_inputs()}
            feed = {}
            for name in fed:
                size = int(np.prod(shapes[name])) * np.dtype(types[name]).itemsize
                raw = np.frombuffer(ctypes.string_at(addresses[name], size), types[name])
                feed[name] = raw.reshape(shapes[name])
            outputs = session.run(None, feed)
            for name, array in zip([n for n in names if n not in fed], outputs, strict=True):
                array = array if self.spoil is None else self.spoil(name, array.copy())
                ctypes.memmove(addresses[name], array.tobytes(), array.nbytes)
            for kind, name, args, _ in self.calls:
                if (kind, name) == ("IExecutionContext", "profiler"):
                    args[0].report_layer_time("conv + relu", 2.0)
                    args[0].report_layer_time("softmax", 1.0)
            return True

        return Thing(
            self,
            "IExecutionContext",
            set_input_shape=set_input_shape,
            set_tensor_address=addresses.__setitem__,
            execute_async_v3=execute,
        )

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


class FakeCuda:
    """`export.cuda.Cuda` on the host's memory."""

    def __init__(self):
        self.stream, self.held = ctypes.c_void_p(7), {}

    def device(self):
        return ("Orin", "8.7")

    def allocate(self, size):
        buffer = ctypes.create_string_buffer(size)
        self.held[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def free(self, address):
        del self.held[address]

    def to_device(self, address, array):
        assert array.nbytes <= len(self.held[address])
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def to_host(self, array, address):
        assert array.nbytes <= len(self.held[address])
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def wait(self):
        pass

    def close(self):
        assert not self.held  # everything was given back
