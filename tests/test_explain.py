"""explain(): a row for every linear site, as data and as a table, and no traces left."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame

import int8compile
from int8compile import Int8Config, SkipReason, cpu, hardware, roofline, triton_kernels
from int8compile.explaining import kernel_of
from int8compile.groups import make_d
from int8compile.ops import reference
from int8compile.passes import linear_site
from int8compile.weights import STORE
from tests.helpers.models import Block, CountingBackend, Stack


class Model(nn.Module):
    """Rewritten, skipped and attention sites, a buffer that the forward pass changes, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.stack = Stack()
        self.norm = nn.BatchNorm1d(32)
        self.router = nn.Linear(32, 4)
        self.lm_head = nn.Linear(32, 64, bias=False)
        self.lm_head.weight = self.embedding.weight
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        x = self.norm(self.stack(self.embedding(ids)))
        x = x + (x @ x.t()) @ x + self.router(x).sum()
        return self.lm_head(x)


def test_a_row_for_every_site() -> None:
    report = int8compile.explain(Model(), torch.arange(5))
    rows = [(site.path, site.op, site.shape, site.reason) for site in report.sites]
    assert rows == [
        ("stack.layers.0.up", "linear", ("5", "32", "64"), None),
        ("stack.layers.0.down", "linear", ("5", "64", "32"), None),
        ("stack.layers.1.up", "linear", ("5", "32", "64"), None),
        ("stack.layers.1.down", "linear", ("5", "64", "32"), None),
        ("router", "linear", ("5", "32", "4"), SkipReason.SMALL),
        ("lm_head", "linear", ("5", "32", "64"), SkipReason.TIED),
    ]
    assert report.sites[0].source == f"models.py:{Block.forward.__code__.co_firstlineno + 1}"
    assert report.totals() == {
        "sites": 6,
        "rewritten": 4,
        "skipped": 2,
        "reasons": {"small": 1, "tied": 1},
        "activation_matmuls": 2,
        "graphs": 1,
        "bytes_before": 4 * (4 * 64 * 32 + 4 * 32 + 64 * 32),
        # In each block, scales for 64 + 32 outputs and d for 32 + 64 inputs.
        "bytes_after": 4 * 64 * 32 + 4 * 2 * 2 * (64 + 32) + 4 * (4 * 32 + 64 * 32),
    }


def test_data_and_table_agree() -> None:
    report = int8compile.explain(Model(), torch.arange(5), config={"skip_modules": ["layers.1", "nothing"]})
    data = json.loads(json.dumps(report.to_dict()))
    keys = ("path", "op", "source", "shape", "rewritten", "reason", "bytes_before", "bytes_after")
    assert all(set(keys) <= site.keys() for site in data["sites"])
    assert data["sites"][2]["reason"] == "its module path matches skip_modules (pattern 'layers.1')"
    assert data["sites"][0]["reason"] is None
    assert data["unused_patterns"] == ["nothing"]
    table = str(report)
    for site in data["sites"]:
        (line,) = [line for line in table.splitlines() if line.startswith(site["path"] + " ")]
        assert (" int8 " in line) is site["rewritten"]
        assert " x ".join(site["shape"]) in line
    assert "2 of 6 linears in int8" in table
    assert "- pattern 'nothing' matched nothing" in table
    if cpu.available():
        assert f"C++ kernel, variant {cpu.variant()}" in table
    else:
        assert "no int8 kernel; the PyTorch reference runs" in table


@pytest.mark.parametrize(
    ("lm_head", "runs_in"), [("native", "float"), ("int8_weight", "int8 weight"), ("int8", "int8")]
)
def test_what_the_lm_head_runs_in(lm_head: str, runs_in: str) -> None:
    report = int8compile.explain(Model(), torch.arange(5), config={"lm_head": lm_head})
    site = report.sites[-1]
    assert (site.path, site.runs_in, site.weight_only) == ("lm_head", runs_in, lm_head == "int8_weight")
    assert [each.runs_in for each in report.sites[:5]] == [*["int8"] * 4, "float"]
    (line,) = [line for line in str(report).splitlines() if line.startswith("lm_head ")]
    assert f"  {runs_in}  " in line
    assert report.to_dict()["sites"][-1]["runs_in"] == runs_in
    # A tied table stays, so the head's int8 weight comes on top.
    assert site.bytes_before == 4 * 64 * 32
    assert site.bytes_after == (4 * 64 * 32 if lm_head == "native" else 64 * 32 + 4 * 64)


def test_nothing_is_left_behind_and_nothing_runs_twice() -> None:
    model, ids = Model(), torch.arange(5)
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes, quantized = set(vars(model)), STORE.quantized
    int8compile.explain(model, ids)
    assert runs == [1]
    assert STORE.quantized == quantized
    assert set(vars(model)) == attributes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    kept = {name for parameter in model.parameters() for name in vars(parameter)}
    assert not any("int8compile" in name for name in kept), "what they are rotated with is decided when they are int8"
    assert eval_frame._debug_get_cache_entry_list(Model.forward.__code__) == []
    assert torch.is_grad_enabled()
    assert model.router.weight.requires_grad


def test_a_compiled_model_is_explained_as_what_it_was_made_from() -> None:
    model, x, backend = Stack(), torch.randn(4, 32), CountingBackend()
    compiled = torch.compile(model, backend=backend)
    compiled(x)
    assert len(int8compile.explain(compiled, x).rewritten) == 4
    # The compiled code of the model is kept.
    compiled(x)
    assert backend.graphs == 1


@pytest.mark.slow
def test_as_often_as_one_likes() -> None:
    """Dynamo stops compiling code after 256 compilations; nothing would be captured then."""
    model, x = nn.Linear(32, 32), torch.randn(2, 32)
    assert [len(int8compile.explain(model, x).rewritten) for _ in range(260)] == [1] * 260


def test_parametrized_linears() -> None:
    """Their `weight` is not a parameter but computed at every access."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)), nn.Linear(32, 32))
    report = int8compile.explain(model, torch.randn(4, 32))
    assert [site.reason for site in report.sites] == [SkipReason.COMPUTED, None]


def test_recurrent_layers_are_named_as_not_captured() -> None:
    report = int8compile.explain(nn.LSTM(32, 32), torch.randn(4, 1, 32))
    assert {site.path for site in report.sites} == {"weight_ih_l0", "weight_hh_l0"}
    assert {site.reason for site in report.sites} == {SkipReason.NOT_CAPTURED}


def test_replaced_buffers_and_random_numbers_are_restored() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))
            self.linear = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            self.seen = torch.cat([self.seen, torch.rand(1)])
            return self.linear(x)

    model, before = Growing(), torch.get_rng_state()
    int8compile.explain(model, torch.zeros(4, 32))
    assert torch.equal(model.seen, torch.zeros(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_errors_are_those_of_the_package() -> None:
    with pytest.raises(int8compile.InputError, match="its input is"):
        int8compile.explain(Stack(), torch.ones(4, 32, dtype=torch.int32))
    model, x = Stack(), torch.randn(4, 32)
    torch.compile(model, backend="int8", options={"free_weights": True})(x)
    with pytest.raises(int8compile.FreedWeightError, match=r"layers\.0\.up\.weight .* Call explain\(\) before"):
        int8compile.explain(model, x)


def test_sizes_of_an_earlier_call_make_no_symbols() -> None:
    for rows in (3, 5):
        assert int8compile.explain(Stack(), torch.randn(rows, 32)).sites[0].shape[0] == str(rows)


def test_functions_keyword_arguments_and_configs() -> None:
    weight = nn.Parameter(torch.randn(48, 32))

    def call(x: Tensor, *, scale: float) -> Tensor:
        return nn.functional.linear(x, weight) * scale

    (site,) = int8compile.explain(call, torch.randn(2, 32), scale=2.0, config=Int8Config(min_features=33)).sites
    assert site.reason is SkipReason.SMALL
    with pytest.raises(int8compile.ConfigError, match="did you mean 'min_features'"):
        int8compile.explain(call, torch.randn(2, 32), scale=2.0, config={"min_feature": 3})


def share(x: Tensor, weight: Tensor, threshold: float, *, rotate: bool) -> float:
    """Return the share of outliers among the activations of a single linear."""
    d = make_d([weight.detach()]) if rotate else None
    return float(reference.digits(reference.quantize_rows(x, d, threshold).Q)[1].ne(0).float().mean())


@pytest.mark.parametrize(("config", "threshold"), [({}, 12.0), ({"rotate": False}, 6.0), ({"threshold": 2.0}, 2.0)])
def test_outliers_are_counted_as_they_will_be(config: dict[str, object], threshold: float) -> None:
    model, x = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 48)), torch.randn(40, 256)
    x[::3, 7] = 200.0
    report = int8compile.explain(model, x, config=config)
    rotate = "rotate" not in config
    assert [site.rotation for site in report.sites] == ([128, 64] if rotate else [1, 1])
    inner = model[1](model[0](x)).detach()
    expected = [share(given, model[i].weight, threshold, rotate=rotate) for i, given in ((0, x), (2, inner))]
    assert [site.outliers for site in report.sites] == pytest.approx(expected)
    assert (expected[0] > 0) is (not rotate or threshold == 2.0)
    (line,) = [line for line in str(report).splitlines() if line.startswith("0 ")]
    assert f"  {100 * expected[0]:.2g} %  " in line
    assert report.to_dict()["sites"][0]["outliers"] == report.sites[0].outliers


def test_columns_that_run_in_float_are_counted() -> None:
    x = torch.randn(2, 5, 64).clamp(-5, 5)
    x[0, 1, 7], x[1, 3, 7], x[1, 0, 9] = 6.0, 8.0, torch.inf
    (site,) = int8compile.explain(nn.Linear(64, 32), x, config={"outliers": "column"}).sites
    assert (site.rotation, site.outliers) == (1, 2 / 64)


def test_int8_weights_alone_have_no_outliers() -> None:
    model = nn.ModuleDict({"lm_head": nn.Linear(64, 32)})

    def call(x: Tensor) -> Tensor:
        return model["lm_head"](x)

    (site,) = int8compile.explain(call, torch.randn(4, 64), config={"lm_head": "int8_weight"}).sites
    assert site.weight_only
    assert site.outliers is None


def test_calibrated_sites_are_marked() -> None:
    model, x = Stack(), torch.randn(64, 32)
    int8compile.calibrate(model.layers[0], [x], progress=False)
    report = int8compile.explain(model, x)
    assert [site.calibrated for site in report.sites] == [True, True, False, False]
    assert [site.rotated() for site in report.sites] == ["32, calibrated", "64, calibrated", "32", "64"]
    assert report.to_dict()["sites"][0]["calibrated"] is True


def test_a_module_that_is_int8_runs_as_it_is() -> None:
    model, x = Stack(), torch.randn(64, 32)
    int8compile.quantize_(model.layers[0], progress=False)
    report = int8compile.explain(model, x, config={"free_weights": True})
    assert [site.rewritten for site in report.sites] == [True] * 4
    assert all(site.outliers is not None for site in report.sites)
    assert [site.rotation for site in report.sites] == [32, 64, 32, 64]


class Breaking(nn.Module):
    """A graph break in a submodule inside a loop, after which Dynamo leaves the outer function to Python."""

    class Part(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            torch._dynamo.graph_break()
            return self.down(y)

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(self.Part() for _ in range(2))
        self.last = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return self.last(x)


def test_patterns_count_as_used_where_the_backend_uses_them() -> None:
    """After a graph break in a submodule, its paths begin there, so this pattern skips nothing."""
    report = int8compile.explain(Breaking(), torch.randn(3, 32), config={"skip_modules": ["parts.0", "down"]})
    assert [site.path for site in report.rewritten] == ["parts.0.up", "parts.1.up"]
    assert report.unused_patterns == ("parts.0",)


def test_after_graph_breaks_paths_are_whole_and_lost_linears_are_named() -> None:
    report = int8compile.explain(Breaking(), torch.randn(3, 32))
    assert [(site.path, site.reason) for site in report.sites] == [
        ("parts.0.up", None),
        ("parts.0.down", None),
        ("parts.1.up", None),
        ("parts.1.down", None),
        ("last", SkipReason.NOT_CAPTURED),
    ]
    assert report.graphs == 2
    assert [site.outliers is not None for site in report.sites] == [True] * 4 + [False]
    for code in (Breaking.forward.__code__, Breaking.Part.forward.__code__):
        assert eval_frame._debug_get_cache_entry_list(code) == []


def test_a_model_on_the_meta_device() -> None:
    """The report shows the sizes of a model that does not fit in memory."""
    report = int8compile.explain(Stack().to("meta"), torch.randn(4, 32, device="meta"))
    assert len(report.rewritten) == 4
    assert report.totals()["bytes_after"] == 4 * 64 * 32 + 4 * 2 * 2 * (64 + 32)
    assert [(site.rotation, site.outliers) for site in report.sites] == [(32, None), (64, None)] * 2


def test_symbolic_rows() -> None:
    x = torch.randn(3, 5, 32)
    torch._dynamo.mark_dynamic(x, 1)
    site = int8compile.explain(Stack(), x).sites[0]
    assert site.shape[0].startswith("3*s")
    assert site.shape[1:] == ("32", "64")


H100 = hardware.gpu("NVIDIA H100 80GB HBM3", "sm_90")


@pytest.mark.parametrize(
    ("k", "n", "rows", "expected"),
    [
        (4096, 14336, "8", "M >= 1"),
        (4096, 14336, "4*s0", "4*s0 >= 1"),
        # A narrow output: from some M on, quantizing x costs as much as the smaller weight saves.
        (4096, 128, "s0", "s0 <= 63"),
        (4096, 2, "s0", "never"),
    ],
)
def test_roofline_in_symbols(k: int, n: int, rows: str, expected: str) -> None:
    assert roofline.describe(k, n, rows, 2, H100) == expected


@pytest.mark.parametrize(("k", "n"), [(4096, 14336), (4096, 128), (576, 192), (4096, 64), (64, 4096), (4096, 2)])
def test_roofline_agrees_with_trying_every_m(k: int, n: int) -> None:
    """The result agrees with both floors of the roofline, evaluated for each M."""
    assert H100.bandwidth
    assert H100.float_peak
    assert H100.int8_peak

    def faster(m: int) -> bool:
        floats = max(2 * (n * k + m * k + m * n) / H100.bandwidth, 2 * m * n * k / H100.float_peak)
        quantize = (3 * m * k + 4 * m) / H100.bandwidth
        ints = max((n * k + m * k + 2 * m * n + 4 * n + 4 * m) / H100.bandwidth, 2 * m * n * k / H100.int8_peak)
        return quantize + ints < floats

    found = roofline.faster(k, n, 2, H100)
    tried = [1, 2, 3, 5, 7, 8, 16, 50, 62, 63, 64, 65, 93, 94, 95, 96, 200, 500, 1000, 5000, 100000]
    assert [m in found for m in tried] == [faster(m) for m in tried]


def test_unknown_hardware_claims_nothing() -> None:
    assert roofline.describe(4096, 4096, "1", 2, hardware.gpu("Some GPU", "sm_80")) == ""
    assert hardware.of(torch.device("cpu")).isa


def test_longest_gpu_name_counts() -> None:
    assert hardware.gpu("NVIDIA A100-SXM4-80GB", "sm_80").bandwidth == 2.039e12
    assert hardware.gpu("NVIDIA A100-PCIE-40GB", "sm_80").bandwidth == 1.555e12
    assert hardware.gpu("NVIDIA L40S", "sm_89").bandwidth == 0.864e12


def test_the_module_of_the_same_name_does_not_hide_the_function() -> None:
    program = "import int8compile, int8compile.explain; assert callable(int8compile.explain), int8compile.explain"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize(
    ("isa", "expected"),
    [
        ("sm_90", "Triton kernels, table of sm_90"),
        ("sm_89", "Triton kernels, table of sm_86"),
        (
            "sm_75",
            "weights in int8, activations in 23 bits, by PyTorch: Triton has no int8 matrix instructions for sm_75",
        ),
        ("sm_70", "no Triton kernels for sm_70; the PyTorch reference runs: it saves memory but is slower than float"),
    ],
)
def test_what_multiplies_on_a_gpu(isa: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "failure", lambda: "")
    assert kernel_of(hardware.gpu("a GPU", isa)) == expected
    monkeypatch.setattr(triton_kernels, "failure", lambda: "Triton is not installed")
    assert kernel_of(hardware.gpu("a GPU", isa)).startswith("no Triton kernels (Triton is not installed); the PyTorch")


def test_a_gpu_without_int8_instructions_gets_int8_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report says so in each line; the CPU stands in for an sm_75."""
    monkeypatch.setattr(linear_site, "_on_gpu_without_int8", lambda parameter: True)
    report = int8compile.explain(nn.Sequential(nn.Linear(32, 32), nn.ReLU()), torch.randn(2, 32))
    assert [site.weight_only for site in report.sites] == [True]
    assert "int8 weight" in str(report)
