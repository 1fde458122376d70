"""Picture <-> quantity: pure functions without models or files.

`depth` (metric depth on a curve through the colour cube), `normals`, `segmentation` (palettes and
instances); `curves` are the curves themselves and `differentiable` decodes depth inside losses
(the only module here that imports torch). Kernels are compiled by numba when first used and kept
in its disk cache; importing this package compiles nothing.
"""
