"""The whole backend on a CUDA build of PyTorch without a GPU, up to the code that Inductor would run on one.

`make test-cuda-build` installs such a build and runs this file; otherwise the file is skipped. Dynamo captures the
model on the CPU. Then every input of the lowered graph is declared to be on a GPU, so that AOTAutograd and Inductor
fuse, copy and launch as they do for CUDA.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

if torch.version.cuda is None or torch.cuda.is_available():
    pytest.skip("needs a CUDA build of PyTorch, and no GPU: make test-cuda-build", allow_module_level=True)

import triton
from torch._dynamo.device_interface import CudaInterface
from torch._guards import TracingContext
from torch._inductor import compile_fx, graph, scheduler

from benchmarks.gpu.standin import CAPABILITY, MULTIPROCESSORS, Driver
from int8compile import backend, triton_kernels
from int8compile.passes import lower_gpu

# Inductor warns about reductions.
pytestmark = pytest.mark.filterwarnings(r"ignore:\s*Online softmax is disabled:UserWarning")

H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=MULTIPROCESSORS,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20,
)


def _moved(value: Any) -> Any:
    return torch.device("cuda", 0) if value == torch.device("cpu") or value == "cpu" else value


class GeneratedError(Exception):
    """Raised instead of loading the code."""


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collect the code of each graph; compiling ends there."""
    codes: list[str] = []

    def to_module(self: Any) -> None:
        code, _ = self.codegen()
        codes.append(code.value)
        raise GeneratedError

    compile_on_cpu = compile_fx.compile_fx

    def compile_for_gpu(module: Any, inputs: list[Any], **given: Any) -> Any:
        mode = TracingContext.get().fake_mode
        assert mode is not None
        with mode:
            moved = [
                torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device="cuda")
                if isinstance(each, Tensor)
                else each
                for each in inputs
            ]
        for node in module.graph.nodes:  # Tensors created inside the graph move as well.
            node.args, node.kwargs = torch.fx.node.map_aggregate((node.args, node.kwargs), _moved)
        module.recompile()
        return compile_on_cpu(module, moved, **given)

    monkeypatch.setattr(compile_fx, "compile_fx", compile_for_gpu)
    monkeypatch.setattr(graph.GraphLowering, "compile_to_module", to_module)
    # Answers of a GPU to the backend and to PyTorch.
    monkeypatch.setattr(backend, "_any_on", lambda kind, parameters: kind == "cuda")
    monkeypatch.setattr(lower_gpu, "has_int8_kernels", lambda device: True)
    monkeypatch.setattr(triton_kernels, "load", lambda: True)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(scheduler, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: H100)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: CAPABILITY)
    for name, answer in {
        "get_device_properties": H100,
        "get_compute_capability": 10 * CAPABILITY[0] + CAPABILITY[1],
        "is_bf16_supported": True,
        "raise_if_triton_unavailable": None,
    }.items():
        monkeypatch.setattr(CudaInterface, name, staticmethod(lambda *_, answer=answer, **__: answer))
    monkeypatch.setattr(CudaInterface.Worker, "get_device_properties", staticmethod(lambda *_: H100))
    with torch._inductor.config.patch(fx_graph_cache=False, joint_graph_constant_folding=False), torch.no_grad():
        yield codes


def code_of(codes: list[str], call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(Exception, match="GeneratedError"):
        torch.compile(call, backend="int8", fullgraph=True)(*args, **kwargs)
    (code,) = codes
    return code


def launches(code: str) -> list[str]:
    """Return the launches in order: our operators by name, Inductor's kernels as `triton`."""
    body = code.split("def call(")[1]
    started = r"torch\.ops\.(\w+\.\w+)[.\w]*|(extern_kernels\.\w+)|(triton)_\w+\.run"
    found = re.findall(rf"^ +(?:\w+ = )?(?:{started})\(", body, re.MULTILINE)
    return ["".join(names) for names in found]


class GatedMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64, eps=1e-5)
        self.gate, self.up = nn.Linear(64, 96, bias=False), nn.Linear(64, 96, bias=False)
        self.down = nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def test_gated_mlp(codes: list[str]) -> None:
    """Four kernels of ours, and one of Inductor's for the residual add; nothing is copied."""
    model = GatedMlp().bfloat16().requires_grad_(False)
    code = code_of(codes, model, torch.randn(4, 64, dtype=torch.bfloat16))
    assert launches(code) == [
        "int8compile.norm_quantize_rows",
        "int8compile.quantized_linear",
        "int8compile.quantize_rows",
        "int8compile.quantized_linear",
        "triton",
    ]
    assert "clone" not in code


def test_decoder(codes: list[str]) -> None:
    """A decoder layer of Llama has one launch for residual add, norm and quantize."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False)
    code = code_of(codes, model, torch.randint(50, (1, 7)), use_cache=False)
    ours = [name for name in launches(code) if name.startswith("int8compile")]
    layer = ["norm_quantize_rows", "quantized_linear", "quantize_rows", "quantized_linear"] * 2
    assert [name.removeprefix("int8compile.") for name in ours] == layer * 3
