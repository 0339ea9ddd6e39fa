"""The build script. build_support/ compiles the C++ kernels and names the wheel; pyproject.toml holds the rest.

Environment variables
    MODULI_KERNELS_BUILD     auto (default): the C++ kernels if a compiler and torch are found, or else a message.
                             python: nothing is compiled. cpu: the C++ kernels, or an error. cuda: reserved.
    MODULI_KERNELS_FUNCTORS  1 or 0: whether the NumPy module `moduli_kernels._functors` is built. By default
                             in-place and editable builds have it and wheels do not, since it is tied to one CPython.
    MAX_JOBS                 how many compilers run at the same time (default: the number of cores).
    TORCH_CUDA_ARCH_LIST     reserved for the CUDA kernels.

torch is not a build requirement, because pip's build isolation would fetch gigabytes of another build of it. Install
torch first, then run `pip install --no-build-isolation .`
"""
from setuptools import setup

from build_support.commands import AbiWheel, BuildNative, NativeDistribution

setup(distclass=NativeDistribution, cmdclass={"build_ext": BuildNative, "bdist_wheel": AbiWheel})
