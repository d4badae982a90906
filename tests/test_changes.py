"""Detecting changes of a tensor: by a few words at every call, by all bytes when there is time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from int8compile.changes import BLOCK, Snapshot, _words, fingerprint

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8]


def values(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-100, 100, size).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(), (0,), (1,), (3,), (7, 5), (64, 32), (3, BLOCK + 5)], ids=str)
def test_the_fingerprint_is_of_the_bytes(size: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = values(*size, dtype=dtype)
    found = fingerprint(tensor)
    assert fingerprint(tensor.clone()) == found
    if tensor.numel() == 0:
        return
    for index in {0, tensor.numel() // 2, tensor.numel() - 1}:
        changed = tensor.clone()
        changed.view(-1)[index] += 1
        assert fingerprint(changed) != found


def test_the_fingerprint_depends_on_the_order() -> None:
    tensor = values(64, 48)
    orders = [tensor, tensor.flip(0), tensor.flip(1), tensor.roll(1, 1)]
    assert len({fingerprint(order) for order in orders}) == 4
    long = values(4 * BLOCK)
    blocks = long.view(4, -1)[[1, 0, 2, 3]].flatten()
    assert fingerprint(blocks) != fingerprint(long)


@pytest.mark.parametrize(
    "take",
    [lambda t: t.t(), lambda t: t[:, :8], lambda t: t[1:], lambda t: t[0].expand(5, -1), lambda t: t.flatten()[1:]],
    ids=["transposed", "columns", "rows", "expanded", "from anywhere"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_the_fingerprint_of_views(take: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    tensor = values(16, 24, dtype=dtype)
    before, found = take(tensor).clone(), fingerprint(take(tensor))
    tensor[0, 20] += 1  # Only some of the views contain this element.
    assert (fingerprint(take(tensor)) == found) == torch.equal(take(tensor), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_update_of_all_elements_is_seen_at_every_call(dtype: torch.dtype) -> None:
    tensor = values(40, 30, dtype=dtype)
    state = Snapshot(tensor)
    assert state.holds(tensor)
    tensor.data.add_(1)  # Does not increase the version counter.
    assert not state.holds(tensor)
    assert Snapshot(tensor).holds(tensor)


def test_the_words_are_spread_over_all_of_the_memory() -> None:
    """The words are so dense that an update of more than an eighth of the memory is seen."""
    tensor = values(64, 64)
    for begin in range(0, 56, 4):
        state = Snapshot(tensor)
        tensor.data[begin : begin + 9].add_(1)
        assert not state.holds(tensor)


def test_states_of_tensors_that_may_not_be_read() -> None:
    for tensor in (values(3, 4)[:, :2], values(1, 4).expand(3, 4), values(1), values(0)):
        state = Snapshot(tensor)
        assert state.holds(tensor)
        if tensor.numel() > 1:
            tensor[0].add_(1)  # Increases the version counter.
            assert not state.holds(tensor)


def test_a_state_keeps_no_memory() -> None:
    tensor = torch.nn.Parameter(values(8, 8), requires_grad=False)
    state = Snapshot(tensor)
    tensor.data = tensor.data.clone()
    assert not state.holds(tensor)
    state = Snapshot(tensor)
    tensor.untyped_storage().resize_(0)
    assert not state.holds(tensor)
    assert len(_words(tensor)) == 0


def test_an_outdated_state_holds_for_nothing() -> None:
    tensor = values(8, 8)
    state = Snapshot(tensor)
    state.outdate()
    assert not state.holds(tensor)


def test_the_same_memory() -> None:
    tensor = values(8, 8)
    first = Snapshot(tensor)
    tensor.add_(1)
    assert first.same_memory(Snapshot(tensor))
    assert not first.same_memory(Snapshot(tensor[1:]))
    assert not first.same_memory(Snapshot(tensor.clone()))
    # An outdated int8 weight on a GPU is remade in place, whatever found it outdated.
    first.outdate()
    assert first.same_memory(Snapshot(tensor))
    del tensor
    assert not first.same_memory(Snapshot(values(8, 8)))
