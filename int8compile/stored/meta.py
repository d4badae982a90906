"""Build a float model whose parameters have no data, so that they take no memory."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary


class _OnMeta(threading.local):
    """The parameters that have lost their data while this thread builds a model; None while it builds none."""

    # By the parameter with data.
    known: WeakTensorKeyDictionary | None = None
    # The device where the data was, by the parameter without data.
    devices: WeakTensorKeyDictionary | None = None


_ON_META = _OnMeta()


@functools.cache
def _watch_parameters() -> None:
    """Install the hook, once per process; torch calls it for every parameter that any thread registers."""

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        known = _ON_META.known
        if known is None or parameter.is_meta or type(parameter) is not nn.Parameter:
            return None
        if parameter not in known:
            known[parameter] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            vars(known[parameter]).update(vars(parameter))
            assert _ON_META.devices is not None
            _ON_META.devices[known[parameter]] = parameter.device
        result: nn.Parameter = known[parameter]
        return result

    # The annotation in torch says that hooks return nothing.
    register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]


_watching = threading.Lock()
_DEVICE: Any = Tensor.device.__get__


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Have parameters that this thread registers lose their data; a parameter used in several places stays one.

    Buffers keep their data, because the constructor computes those that are not saved (rotary frequencies). The
    parameters still report their original device, because constructors compute buffers on the device of a parameter.
    """
    with _watching:
        _watch_parameters()
    # Weak keys: with strong ones, memory would hold the float model.
    _ON_META.known, _ON_META.devices = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
    try:
        with _AsIfThereWereData(_ON_META.devices):
            yield
    finally:
        _ON_META.known = _ON_META.devices = None


class _AsIfThereWereData(TorchFunctionMode):
    """Skips random initialization of tensors without data, and reports the original device of parameters.

    torch itself takes a millisecond per parameter to skip the initialization.
    """

    def __init__(self, devices: WeakTensorKeyDictionary) -> None:
        super().__init__()
        self._devices = devices

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_) and args[0].is_meta:
            return args[0]
        if func == _DEVICE and args[0] in self._devices:
            return self._devices[args[0]]
        return func(*args, **(kwargs or {}))
