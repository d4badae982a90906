"""Real architectures at toy size: one graph, every linear accounted for, close to float.

One layer each, since Inductor takes seconds for each more.
"""

from __future__ import annotations

import pytest
import torch

import int8compile
from tests.helpers.architectures import CASES, FIRST, IDS, Case, llama
from tests.helpers.models import CountingBackend

transformers = pytest.importorskip("transformers")


# Llama 4 rotates with complex numbers, which Inductor leaves to eager.
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators")
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=[] if name in FIRST else pytest.mark.slow) for name, case in CASES.items()],
)
def test_architecture(case: Case) -> None:
    model = case.build().eval()
    report = int8compile.explain(model, **case.inputs)
    assert report.graphs == 1
    assert len(report.rewritten) == case.rewritten, str(report)
    assert {site.path: site.reason.name.lower() for site in report.skipped} == case.float_
    assert report.activation_matmuls > 0
    with torch.no_grad():
        expected = model(**case.inputs)[0]
        actual = torch.compile(model, backend="int8", fullgraph=True)(**case.inputs)[0]
    assert actual.shape == expected.shape
    assert torch.nn.functional.cosine_similarity(actual.flatten(), expected.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("cache", ["static", pytest.param("dynamic", marks=pytest.mark.slow)])
def test_generate(cache: str) -> None:
    """model.generate() with int8 and a KV cache gives the tokens of the compiled model without a cache."""
    model = llama().eval()
    expected = IDS
    compiled = torch.compile(model, backend="int8", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for _ in range(5):
            logits = compiled(expected, use_cache=False).logits[:, -1]
            expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    torch._dynamo.reset()
    graphs = CountingBackend()
    # Assigned, because `torch.compile(model).generate` runs the float model.
    model.compile(backend=graphs, fullgraph=cache == "static")
    options = {"cache_implementation": "static"} if cache == "static" else {}
    actual = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, min_new_tokens=5, do_sample=False, **options
    )
    assert torch.equal(actual, expected)
    assert graphs.graphs
