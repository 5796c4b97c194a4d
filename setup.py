"""The compiled kernels: an optional extension. Without a compiler, or on another processor, puna uses PyTorch alone."""

import platform

from setuptools import Extension, setup

FOLDER = "src/puna/model/native/"
X86 = platform.machine() in ("x86_64", "AMD64")

# Built for every x86-64: each file names its own instruction set, and the loader picks by what the processor has.
# -fopenmp only compiles: the threads are those of the OpenMP runtime that PyTorch has already loaded.
# No -ffast-math and no contraction: an answer's bits must not depend on what a compiler finds convenient.
KERNELS = Extension(
    "puna.model.native._kernels",
    sources=[FOLDER + "avx512.c", FOLDER + "avx2.c"],
    depends=[
        FOLDER + name
        for name in ("simd.h", "linear.c", "elementwise.c", "quantize.c", "attention.c", "records.c", "rotary.c",
                     "experts.c", "layers.c", "words.c", "rows.c", "vision.c", "training.c", "causal.c")
    ],
    extra_compile_args=["-O3", "-g0", "-std=gnu11", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi"],
    optional=True,
)

setup(ext_modules=[KERNELS] if X86 else [])
