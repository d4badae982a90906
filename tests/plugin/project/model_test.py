"""Tests of a user. Not named test_*.py, so that the tests of int8compile do not collect them."""

import pytest
import torch
from model import Model
from torch import nn

torch.set_num_threads(1)


def test_speed(int8_benchmark):
    speed = int8_benchmark(Model(), torch.randn(128, 512), baseline="float32", rounds=21, expect_float=["lm_head"])
    assert speed.times is None or speed.ratio > 0


def test_minimum(int8_benchmark):
    linear = nn.Linear(64, 64).requires_grad_(False)
    with pytest.raises(pytest.fail.Exception, match="min_speedup=1000: the whole interval is below"):
        int8_benchmark(linear, {"input": torch.randn(4, 64)}, baseline=linear, rounds=6, min_speedup=1000)


def test_seconds(benchmark):
    benchmark(sorted, range(1000))


def test_accuracy(int8_accuracy):
    result = int8_accuracy(Model(), torch.randn(128, 512), max_error=0.05)
    assert result.layers
    with pytest.raises(pytest.fail.Exception, match=r"max_error=1e-09[\s\S]*its own output is"):
        int8_accuracy(Model(), torch.randn(128, 512), max_error=1e-9)
