"""Sizes of all measurements. A dry run has the same measurements, small enough for a CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.gpu.llama import LlamaConfig


class Shape(NamedTuple):
    """A weight.

    Attributes:
        name: Name of the linear in a Llama; linears that read the same activations are one.
        k: Inputs.
        n: Outputs.
    """

    name: str
    k: int
    n: int

    def facts(self, m: int) -> dict[str, str | int]:
        """Return the shape and a number of rows as a part of a case's result."""
        return {"shape": self.name, "k": self.k, "n": self.n, "m": m}

    def __str__(self) -> str:
        return f"{self.name} {self.k}x{self.n}"


class Gate(NamedTuple):
    """A product whose result must equal the reference.

    Attributes:
        m: Rows.
        k: Inputs.
        n: Outputs.
        threshold: Threshold of outliers; 0 for none.
        special: Whether some rows contain Inf and NaN.
    """

    m: int
    k: int
    n: int
    threshold: float = 12.0
    special: bool = False

    def __str__(self) -> str:
        special = ", Inf and NaN" if self.special else ""
        return f"M={self.m} {self.k}x{self.n}, threshold {self.threshold:g}{special}"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of all stages.

    Attributes:
        dry_run: Whether the run only shows that everything works.
        tests: Files with tests that need a GPU.
        export_tests: Files with such tests that export models, which takes longer.
        workers: Number of processes that run tests.
        gates: The correctness gates.
        shapes: Weights of the linear layers.
        rows: All M of the linear layers.
        first_rows: The most important of them.
        outlier_rows: M of the stage on the parts of a product.
        outlier_columns: Number of activation columns with outliers, in the comparison with other packages.
        candidate_rows: An M for each row of the kernels' table.
        peer_rows: M of the comparison with other packages.
        exported_rows: M of the comparison with an exported model.
        rounds: How often everything is timed.
        steps: Tokens in a round of decoding.
        copied: Bytes of the copy that measures the bandwidth.
        square: M, K and N of the product that measures the peak rate.
        launches: Number of calls in a row whose mean is the host's time of a call.
        llama: Sizes of the model.
        compilers: Arguments of `torch.compile` for the baselines of a linear layer, by name.
        autotune: The same for a baseline that is slow to compile.
        autotuned_shapes: Names of the weights for that baseline.
        decoders: The same for the model in bfloat16.
        int8_decoder: The same for the model in int8.
        peer_compiler: The same for packages that need to be compiled.
    """

    dry_run: bool
    tests: tuple[str, ...]
    export_tests: tuple[str, ...]
    workers: int
    gates: tuple[Gate, ...]
    shapes: tuple[Shape, ...]
    rows: tuple[int, ...]
    first_rows: tuple[int, ...]
    outlier_rows: tuple[int, ...]
    outlier_columns: int
    candidate_rows: tuple[int, ...]
    peer_rows: tuple[int, ...]
    exported_rows: tuple[int, ...]
    rounds: int
    steps: int
    copied: int
    square: int
    launches: int
    llama: LlamaConfig
    compilers: Mapping[str, Mapping[str, Any]]
    autotune: Mapping[str, Mapping[str, Any]]
    autotuned_shapes: tuple[str, ...]
    decoders: Mapping[str, Mapping[str, Any]]
    int8_decoder: Mapping[str, Any]
    peer_compiler: Mapping[str, Any]


# Not "max-autotune": its CUDA graphs would be inside the graphs that are captured here. The kernels are the same.
_MAX_AUTOTUNE = {"mode": "max-autotune-no-cudagraphs"}


def for_gpu(layers: int) -> Sizes:
    """Return the sizes of Llama-3.1-8B, with a decoder of some layers."""
    return Sizes(
        dry_run=False,
        # Collecting all of tests/ would compile the CPU kernel.
        tests=("tests/triton_kernels/test_triton_contract.py",),
        export_tests=(
            "tests/exporting/test_export_gpu.py",
            "tests/exporting/test_export.py",
            "tests/stored/test_checkpoint.py",
        ),
        workers=14,
        gates=(
            Gate(1, 4096, 4096),
            Gate(16, 4096, 6144),
            # Gluon's larger tile; its smaller tile with split sums; the other kernels.
            Gate(1024, 4096, 4096),
            Gate(300, 4096, 1024),
            Gate(48, 14336, 512),
            Gate(100, 4096, 1024),
            Gate(7, 100, 33),
            Gate(150, 1000, 77),
            Gate(1, 14336, 512, threshold=0.0),
            Gate(513, 4096, 512, threshold=0.0),
            Gate(5, 4096, 512, special=True),
            Gate(520, 4096, 512, special=True),
        ),
        shapes=(
            Shape("qkv", 4096, 6144),
            Shape("o", 4096, 4096),
            Shape("gate_up", 4096, 28672),
            Shape("down", 14336, 4096),
        ),
        rows=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
        first_rows=(2048, 1, 64, 16, 256),
        outlier_rows=(2048, 1, 16, 8192, 512, 64),
        outlier_columns=32,
        candidate_rows=(1, 2048, 16, 32, 64, 128, 192, 384, 8, 512, 8192),
        peer_rows=(1, 32, 512, 2048),
        exported_rows=(1, 16, 300, 2048),
        rounds=30,
        steps=16,
        copied=2 * 2**30,
        square=8192,
        launches=100,
        llama=LlamaConfig(layers=layers),
        compilers={"Inductor": {}},
        autotune={"max-autotune": _MAX_AUTOTUNE},
        autotuned_shapes=("o", "gate_up"),
        decoders={"bf16 reduce-overhead": {"mode": "reduce-overhead"}},
        int8_decoder={"backend": "int8", "mode": "reduce-overhead"},
        peer_compiler=_MAX_AUTOTUNE,
    )


def with_rows(sizes: Sizes, rows: tuple[int, ...]) -> Sizes:
    """Return the sizes with other numbers of rows, except for the exported model."""
    return dataclasses.replace(
        sizes, rows=rows, first_rows=rows, outlier_rows=rows, candidate_rows=rows, peer_rows=rows
    )


def dry_run() -> Sizes:
    """Return sizes that take seconds on a CPU. Only the int8 model is compiled."""
    # Dynamo without a compiler.
    eager = {"backend": "eager"}
    return Sizes(
        dry_run=True,
        tests=("tests/test_config.py",),
        export_tests=("tests/test_config.py",),
        workers=1,
        gates=(Gate(3, 64, 48), Gate(5, 100, 33, threshold=0.0), Gate(4, 64, 48, special=True)),
        shapes=(Shape("o", 64, 64), Shape("down", 192, 64)),
        rows=(80, 1, 2),
        first_rows=(80, 1),
        outlier_rows=(64, 1),
        outlier_columns=1,
        candidate_rows=(1, 64),
        peer_rows=(1,),
        exported_rows=(1, 5),
        rounds=2,
        steps=1,
        copied=2**16,
        square=64,
        launches=5,
        llama=LlamaConfig(
            layers=1, hidden=64, heads=4, kv_heads=2, intermediate=96, vocabulary=128, length=16, theta=10000.0
        ),
        compilers={"Inductor": eager},
        autotune={"max-autotune": eager},
        autotuned_shapes=("down",),
        decoders={"bf16 reduce-overhead": eager},
        int8_decoder={"backend": "int8", "mode": "reduce-overhead"},
        peer_compiler=eager,
    )
