"""A copy of a model whose linears change between float and int8, for `advise`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from int8compile.config import Int8Config
from int8compile.observation import args_in
from int8compile.passes import WeightView
from int8compile.stored.convert import Converter, places_of, quantized_one_by_one, replace
from int8compile.stored.targets import Target, plan
from int8compile.weights import STORE, Rotation, put_rotations, rotation_of_view, rotations_of


class Trial:
    """A copy of a model in float32 whose linears can be int8 or float.

    Attributes:
        model: The copy. Weights that are in float32 already share the memory of the model's.
        calibrated: Whether the caller has calibrated weights that may be int8.
    """

    def __init__(self, model: nn.Module) -> None:
        # Parameters of its own, because rotations are kept with parameters.
        own = {
            id(parameter): nn.Parameter(args_in(parameter.detach(), torch.float32), requires_grad=False)
            for parameter in model.parameters()
        }
        self.model = copy.deepcopy(model, dict(own)).eval()
        if any(each.is_floating_point() and each.dtype != torch.float32 for each in model.parameters()):
            self.model.float()  # Its buffers, too.
        self._originals = {id(own[id(parameter)]): parameter for parameter in model.parameters()}
        self._float: dict[str, Target] = {}
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        self.calibrated = False

    def targets(self, config: Int8Config) -> list[Target]:
        """Return the weights of the float model that may be int8; those of one path are one."""
        targets = plan(self.model, config)
        places = places_of(self.model)
        for target in targets:
            if target.reason is None and target.path not in self._float:
                self._float[target.path] = target
                experts = target.source == "experts"
                within = [(target.module, target.path.rpartition(".")[2])]
                self._places[target.path] = within if experts else places[id(target.module)]
                # A calibration that the caller has applied belongs to the config as given.
                rotation = rotation_of_view(self._originals[id(target.weight)], target.view)
                if rotation is not None and rotation.calibrated:
                    STORE.calibrate([(target.weight, target.view)], rotation.d)
                    self.calibrated = True
        return targets

    def quantized(self, config: Int8Config) -> dict[str, nn.Module]:
        """Return int8 modules for the linears that are int8 under a config, and leave the model in float."""
        self.put({})
        chosen = [target for target in self.targets(config) if target.reason is None]
        converter = Converter(self.model, config)
        made = {target.path: converter.put(target, *weight) for target, weight in quantized_one_by_one(chosen)}
        self.put({})
        return dict(made)

    def put(self, int8: Mapping[str, nn.Module], skipped: Iterable[str] = ()) -> nn.Module:
        """Return the model with these int8 modules, except for those whose paths are skipped."""
        skipped = set(skipped)
        for path, target in self._float.items():
            new: Any = target.weight if target.source == "experts" else target.module
            replace(self._places[path], int8[path] if path in int8 and path not in skipped else new)
        return self.model

    def rotations(self) -> list[tuple[nn.Parameter, dict[WeightView, Rotation]]]:
        """Return the rotations of all weights, which a calibration replaces."""
        return [(parameter, rotations_of(parameter)) for parameter in self.model.parameters()]

    def put_rotations(self, rotations: Iterable[tuple[nn.Parameter, Mapping[WeightView, Rotation]]]) -> None:
        """Undo a calibration: put back what `rotations` returned."""
        self.put({})
        for parameter, known in rotations:
            put_rotations(parameter, known)

    def float_module(self, path: str) -> nn.Module | None:
        """Return the float module of a path, None for the weights of experts."""
        target = self._float[path]
        return None if target.source == "experts" else target.module

    def dtype(self, path: str) -> torch.dtype:
        """Return the dtype that a weight has in the model that was copied."""
        return self._originals[id(self._float[path].weight)].dtype

    def sizes(self, path: str, module: Any, seen: set[int]) -> tuple[int, int]:
        """Return the bytes of a linear's weight in float and in int8; 0 for a weight whose id was seen before.

        The bytes in float are those of the model that was copied.
        """
        weight = self._originals[id(self._float[path].weight)]
        if id(weight) in seen:
            return 0, 0
        seen.add(id(weight))
        held = [module.qweight, module.scale, *([] if module.d is None or id(module.d) in seen else [module.d])]
        seen.add(id(module.d))
        return weight.nbytes, sum(tensor.nbytes for tensor in held)
