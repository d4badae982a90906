"""Code that Dynamo does not compile is reported as running in float; code that it compiles is not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import int8compile
from int8compile import Int8Warning, frames
from tests.helpers.models import INT8_ERROR, relative_error


class Recurrent(nn.Module):
    """Dynamo compiles neither an LSTM nor the code around it."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(64, 64, batch_first=True)
        self.out = nn.Linear(64, 64)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.out(self.rnn(x)[0]))


class Loop(nn.Module):
    """A graph break inside a loop makes Dynamo give up on the whole function."""

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = layer or nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            torch._dynamo.graph_break()
            x = self.layer(x)
        return x


class Inner(nn.Module):
    """A user's module, which Dynamo compiles although it does not compile the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Break(nn.Module):
    """A graph break between two graphs, of which the first is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.layer(x)


X = torch.randn(2, 6, 64)


@pytest.fixture(autouse=True)
def _watched() -> None:
    frames.watch()  # Importing int8compile does this; each test begins with a reset of Dynamo.


def run(model: nn.Module, **options: Any) -> tuple[float, list[str]]:
    """Return the error of a compiled model, and our warnings' messages."""
    model = model.eval().requires_grad_(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = torch.compile(model, **({"backend": "int8"} | options))(X)
    said = [str(warning.message) for warning in caught if warning.category is Int8Warning]
    return relative_error(y, model(X)), said


@pytest.mark.parametrize(
    ("make", "linears"), [(Recurrent, "out, head.1"), (Loop, "layer")], ids=["recurrent", "graph break in a loop"]
)
def test_code_that_dynamo_gives_up_on(make: type[nn.Module], linears: str) -> None:
    error, said = run(make())
    assert error == 0
    assert len(said) == 1
    assert f"Dynamo does not compile {make.__name__}.forward" in said[0]
    assert f"so linears that it calls run in float: {linears}. " in said[0]
    # Following the message's advice helps.
    model = make().eval().requires_grad_(False)
    expected = model(X)
    assert int8compile.quantize_(model, progress=False).rewritten
    assert 0 < relative_error(model(X), expected) < INT8_ERROR


class Masked(nn.Module):
    """PyTorch's encoder breaks the graph where it reads the mask's values."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.out = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(x, mask=nn.Transformer.generate_square_subsequent_mask(6)))


@pytest.mark.parametrize("compiled", ["model", "encoder"])
def test_a_break_inside_a_module_of_pytorch(compiled: str) -> None:
    model = Masked().eval().requires_grad_(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if compiled == "model":
            assert 0 < relative_error(torch.compile(model, backend="int8")(X), model(X)) < INT8_ERROR
        else:
            mask = nn.Transformer.generate_square_subsequent_mask(6)
            y = torch.compile(model.encoder, backend="int8")(X, mask=mask)
            assert torch.equal(y, model.encoder(X, mask=mask))
    said = [str(warning.message) for warning in caught if warning.category is Int8Warning]
    assert len(said) == 1
    assert "Dynamo breaks the graph inside a module of PyTorch (transformer.py:" in said[0]
    layers = "encoder.layers.0" if compiled == "model" else "layers.0"
    assert (
        f"so linears that it calls run in float: {layers}.self_attn.out_proj, {layers}.linear1, {layers}.linear2."
        in said[0]
    )


def test_what_is_compiled_all_the_same_is_not_named() -> None:
    for model in (Break(), Loop(Inner())):
        torch._dynamo.reset()
        frames.watch()
        error, said = run(model)
        assert 0 < error < INT8_ERROR
        assert not said


def test_other_backends_are_not_our_business() -> None:
    assert run(Recurrent(), backend="aot_eager") == (0, [])


def test_a_reset_of_dynamo_forgets_until_the_next_graph() -> None:
    run(Inner())
    error, said = run(Recurrent())
    assert error == 0
    assert len(said) == 1


def test_where_one_graph_is_asked_for_the_error_says_it() -> None:
    model = Recurrent().eval()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="LSTM"):
        torch.compile(model, backend="int8", fullgraph=True)(X)
