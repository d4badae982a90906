"""The weight store: every parameter is quantized once, however many graphs use it, and again when it has changed.

Graphs do not own int8 weights. One compiled graph serves many modules (regional compilation), a recompile sees the same
parameters, tied modules share one. Therefore the int8 weight is looked up at every call, by the parameter that arrives.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn
from torch._guards import CompileContext
from torch.optim.optimizer import register_optimizer_step_post_hook

from int8compile.changes import Snapshot, fingerprint
from int8compile.errors import BadWeightError, FreedWeightError, Int8Warning
from int8compile.frames import is_ours
from int8compile.groups import make_d
from int8compile.ops import dequantize_weight, pack_weight, quantize_weight, rotation_size
from int8compile.passes.static import WeightView, rotation_in_view


class Key(NamedTuple):
    """The form of a parameter's int8 weight: of which view it is, whether it is packed, and whether it is rotated."""

    view: WeightView
    packed: bool
    rotated: bool


@dataclasses.dataclass(eq=False)
class QuantizedWeight:
    """A view of a parameter in int8. Another object takes its place when the parameter has changed.

    Attributes:
        qweight: [N, K] or [B, N, K] int8, or that packed as `int8compile.ops.pack_weight` does. A slice of `fused`
            where there is one.
        scale: [N] or [B, N] float32.
        d: Its rotation, [K] or [B, K] float32, one object for all weights that share it; None where it is not rotated.
        made_of: The state of the parameter when it was quantized.
        made_with: The states of its scales, and of d if it has one, where the parameter is int8 already.
        fused: The weights in whose common tensor this one lies, because one operator takes them together.
    """

    qweight: Tensor
    scale: Tensor
    d: Tensor | None
    made_of: Snapshot
    made_with: tuple[Snapshot, ...] = ()
    fused: FusedWeight | None = None

    def is_of(self, parameter: Tensor, given: Sequence[Tensor]) -> bool:
        """Return whether its tensors are unchanged, as far as a call can tell. Freed parameters count as unchanged."""
        if type(parameter) not in FREED and not self.made_of.holds(parameter):
            return False
        return not self.made_with or (
            len(given) == len(self.made_with) and all(map(Snapshot.holds, self.made_with, given))
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Rotation:
    """The rotation of a view of a parameter. It is an attribute of the parameter, so `.data = ...` keeps it.

    Attributes:
        d: [K] or [B, K] float32.
        calibrated: Whether it was computed from activations too.
        number: The order of creation. Of two rotations the older one is kept.
    """

    d: Tensor
    calibrated: bool = False
    number: int = dataclasses.field(default_factory=itertools.count().__next__)


class _Rotations(dict[WeightView, Rotation]):
    """The rotations of a parameter by view. They are not pickled as such: a model must load without int8compile."""

    def __reduce__(self) -> tuple[Any, ...]:
        # One of the types that torch.load takes with weights_only=True.
        return collections.OrderedDict, ()


# The name of the attribute.
_ROTATIONS = "_int8compile_rotations"

# Linears that share a rotation: parameters and the weights as views of them.
Members = Sequence[tuple[Tensor, WeightView]]


@dataclasses.dataclass(eq=False)
class FusedWeight:
    """Several weights in one tensor, concatenated or with their rows interleaved. They are slices of it.

    Attributes:
        qweight: Their rows, or panels where they are packed.
        scale: Their scales.
        interleaved: Whether their rows alternate.
        members: Weak references to the weights, which hold this object: a cycle would keep memory for longer.
    """

    qweight: Tensor
    scale: Tensor
    interleaved: bool
    members: tuple[weakref.ref[QuantizedWeight], ...]


class _Freed:
    """A weight whose memory was released. Any use but reading its metadata raises `FreedWeightError`."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # While Dynamo traces for this backend, the call only becomes a node, and the backend ensures that nothing reads
        # the data. Other backends would read memory that is gone.
        if func in METADATA or _traced_for_int8():
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise FreedWeightError(
            f"{torch.overrides.resolve_name(func) or func} was called on a weight whose memory free_weights=True "
            "has given back. Use the compiled model, or load the weights again with "
            "load_state_dict(state, assign=True), or compile without free_weights"
        )

    def __repr__(self: Any) -> str:
        return f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"


class FreedWeight(_Freed, nn.Parameter):  # type: ignore[misc]
    """A float weight of the model."""


class FreedBuffer(_Freed, Tensor):  # type: ignore[misc]
    """An int8 weight of a module that `quantize_` made."""


FREED = (FreedWeight, FreedBuffer)

# Devices whose graphs hold addresses: there, the int8 weight of a parameter changed in place is changed in place, too.
IN_PLACE = ("cuda",)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _traced_for_int8() -> bool:
    """Return whether Dynamo is tracing for this backend; the answer becomes a constant of the trace."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:
        # Nothing is traced: this is eager mode, unless AOTAutograd or Inductor works on a graph from a backend.
        return CompileContext.try_get() is not None
    return is_ours(backend)


_ATTRIBUTES = (
    *("_base", "_version", "device", "dtype", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_mps"),
    *("is_mkldnn", "is_nested", "is_quantized", "is_sparse", "is_sparse_csr", "is_xpu", "itemsize", "layout", "name"),
    *("nbytes", "ndim", "output_nr", "requires_grad", "retains_grad", "shape", "volatile"),
)
# Functions that need no data of a tensor.
METADATA = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
    *(getattr(Tensor, name).__set__ for name in ("grad", "requires_grad")),
    *(getattr(Tensor, name).__delete__ for name in ("grad",)),
    *(Tensor.__hash__, Tensor.__len__, Tensor.dim, Tensor.dim_order, Tensor.element_size, Tensor.get_device),
    *(Tensor.is_complex, Tensor.is_conj, Tensor.is_contiguous, Tensor.is_floating_point),
    *(Tensor.is_inference, Tensor.is_neg, Tensor.is_shared, Tensor.is_signed, Tensor.ndimension, Tensor.nelement),
    *(Tensor.numel, Tensor.requires_grad_, Tensor.size, Tensor.storage_offset, Tensor.stride, Tensor.untyped_storage),
    *(torch.is_complex, torch.is_conj, torch.is_floating_point, torch.is_inference, torch.is_neg, torch.is_signed),
    *(torch.get_device, torch.numel),
}


class WeightStore:
    """int8 weights by parameter. They are released when the parameter is.

    Attributes:
        quantized: The number of times a weight was quantized, refreshes included.
    """

    def __init__(self) -> None:
        self.quantized = 0
        # Keys are identities, because comparing tensors compares elements. Entries live as long as the parameter's
        # storage; a weak reference to the parameter itself would prevent `torch.utils.swap_tensors`.
        self._parameters: dict[int, tuple[weakref.ref[UntypedStorage], dict[Key, QuantizedWeight]]] = {}
        self._lock = threading.RLock()

    def fresh(self, parameter: Tensor, key: Key, given: Sequence[Tensor] = ()) -> QuantizedWeight | None:
        """Return the int8 weight of a parameter if there is one and the parameter is unchanged.

        Args:
            parameter: The parameter, as the compiled graph received it.
            key: The form of the int8 weight.
            given: The scales of a parameter that is int8 already, and its d if it has one.
        """
        known = self._parameters.get(id(parameter))
        weight = None if known is None else known[1].get(key)
        return weight if weight is not None and weight.is_of(parameter, given) else None

    def get(
        self,
        parameter: Tensor,
        view: WeightView,
        path: str,
        *,
        packed: bool = False,
        scale: Tensor | None = None,
        d: Tensor | None = None,
        group: Members = (),
        among: Members = (),
        each: bool = False,
    ) -> QuantizedWeight:
        """Return the int8 weight of a parameter's view, quantized now if it never was or if the parameter has changed.

        A parameter that was changed in place on a GPU is quantized into the same int8 tensors, so their addresses stay
        valid in CUDA graphs. Otherwise new tensors replace the old ones in one step, as a new `.data` does: a thread
        that computes with the old tensors goes on with them.

        Args:
            parameter: The parameter, as the compiled graph received it.
            view: The weight as a view of it.
            path: Module path, for messages.
            packed: Whether the graph takes it packed.
            scale: The scales of a parameter that is int8 already.
            d: The rotation of such a parameter.
            group: The weights that share its rotation, itself among them; empty where it is not rotated.
            among: See `share`.
            each: See `share`.

        Raises:
            BadWeightError: The weight has NaN or Inf, or no data.
        """
        key = Key(view, packed, bool(group))
        given = [] if scale is None else [scale] if d is None else [scale, d]
        weight = self.fresh(parameter, key, given)
        if weight is None:
            with self._lock:
                weight = self._refresh(parameter, key, path, given, group, among, each)
        return weight

    def share(self, members: Members, among: Members = (), *, each: bool = False) -> Tensor | None:
        """Return the d of linears that read one x. It is computed the first time and kept with the parameters.

        If some of the linears have a d already, all get it. Of several, a freed weight's d has priority, then a
        calibrated one, then the oldest. Weights quantized with another d are quantized again at their next use.

        Args:
            members: Parameters, and the weights as views of them, of one K.
            among: The linears that a new d is computed from, see `groups`; by default the members.
            each: Whether each matrix of one weight [B, N, K] is rotated by a d of its own.

        Returns:
            [K] float32, or [B, K]; None where K has too few factors of two.

        Raises:
            FreedWeightError: Two of them were freed and are rotated differently.
        """
        if rotation_size(members[0][1].shape[-1]) == 1:
            return None
        with self._lock:
            device = members[0][0].device
            known = [rotation_of_view(*member) for member in members]
            chosen = _chosen(members, known)
            if chosen is None:
                # Linears on other devices read other tensors.
                chosen = self._made([member for member in among or members if member[0].device == device], each)
            if chosen.d.device != device:
                with _plain_tensors():
                    chosen = dataclasses.replace(chosen, d=chosen.d.to(device))
            for (parameter, view), rotation in zip(members, known, strict=True):
                if rotation is not chosen:
                    self._rotate(parameter, view, chosen)
            return chosen.d

    def _made(self, among: Members, each: bool) -> Rotation:
        """Return a rotation for linears of one group that have none yet."""
        known = [rotation_of_view(*member) for member in among]
        present = [rotation for rotation in known if rotation is not None and not rotation.calibrated]
        if present:
            return min(present, key=lambda rotation: rotation.number)
        with _plain_tensors():
            # Weights without data are refused later, when they are to be quantized.
            weights = [
                view.of(parameter)
                for parameter, view in among
                if not (parameter.is_meta or isinstance(parameter, FREED))
            ]
            made = Rotation(make_d(weights, each=each))
        for (parameter, view), rotation in zip(among, known, strict=True):
            if rotation is None:
                self._rotate(parameter, view, made)
        return made

    def calibrate(self, members: Members, d: Tensor) -> None:
        """Set the d of linears that read one x to the d that a calibration found.

        Shapes:
            d: [K] float32, or [B, K] for one weight [B, N, K].
        """
        with self._lock:
            rotation = Rotation(d, calibrated=True)
            for parameter, view in members:
                if isinstance(parameter, FREED):
                    raise FreedWeightError("a weight whose memory was given back cannot be calibrated any more")
                self._rotate(parameter, view, rotation)

    def _rotate(self, parameter: Tensor, view: WeightView, rotation: Rotation) -> None:
        rotations = vars(parameter).get(_ROTATIONS)
        if not isinstance(rotations, _Rotations):  # An unpickled parameter has an OrderedDict.
            rotations = vars(parameter)[_ROTATIONS] = _Rotations()
        rotations[view] = rotation
        for key, weight in self.weights(parameter).items():
            if key.view == view and key.rotated and weight.d is not rotation.d:
                weight.made_of.outdate()

    def compare(self, parameter: Tensor, given: Sequence[Tensor] = ()) -> None:
        """Compare a whole parameter with its state when it was quantized. The next call replaces weights that differ.

        It reads all of the memory, so it is called when a graph is compiled: updates of a GPU's memory, or of a few
        elements, may leave no trace that each call can see.
        """
        weights = self.weights(parameter).values()
        if weights and type(parameter) not in FREED:
            found = fingerprint(parameter)
            for weight in weights:
                if weight.made_of.fingerprint != found:
                    weight.made_of.outdate()
        for place, tensor in enumerate(given if weights else ()):
            found = fingerprint(tensor)
            for weight in weights:
                if place < len(weight.made_with) and weight.made_with[place].fingerprint != found:
                    weight.made_with[place].outdate()

    def fused(self, weights: Sequence[QuantizedWeight], *, interleaved: bool = False) -> FusedWeight:
        """Return weights as slices of one tensor. They are copied there if necessary, so that memory holds them once.

        Args:
            weights: The weights, all packed or none.
            interleaved: Whether their rows alternate; they have one shape then.
        """
        fused = weights[0].fused
        layout = (interleaved, tuple(map(weakref.ref, weights)))
        # `alone` may have taken one of them out.
        if fused is None or (fused.interleaved, fused.members) != layout or any(w.fused is not fused for w in weights):
            with self._lock, _plain_tensors():
                fused = _fuse(weights, interleaved)
        return fused

    def alone(self, weight: QuantizedWeight) -> QuantizedWeight:
        """Return a weight with contiguous rows, as compiled graphs that take it alone expect."""
        if not weight.qweight.is_contiguous():
            with self._lock, _plain_tensors():
                weight.qweight, weight.scale = weight.qweight.contiguous(), weight.scale.contiguous()
                weight.fused = None
        return weight

    def weights(self, parameter: Tensor) -> dict[Key, QuantizedWeight]:
        """Return the int8 weights of a parameter by their form; none for a parameter that was never quantized."""
        known = self._parameters.get(id(parameter))
        return known[1] if known is not None and known[0]() is parameter.untyped_storage() else {}

    def forget(self, parameter: Tensor) -> None:
        """Mark a parameter's int8 weights as stale, so that the next call quantizes it again."""
        for weight in self.weights(parameter).values():
            weight.made_of.outdate()

    @contextlib.contextmanager
    def kept(self, parameter: Tensor) -> Iterator[None]:
        """Keep a parameter's int8 weights while it gets another storage, except weights that are stale already."""
        with self._lock:
            weights = {key: each for key, each in self.weights(parameter).items() if each.made_of.holds(parameter)}
            self._parameters.pop(id(parameter), None)
            yield
            for key, weight in weights.items():
                self._keep(parameter, key, weight)

    def nbytes(self) -> int:
        """Return the bytes of all int8 weights, scales and d held."""
        weights = [weight for _, views in list(self._parameters.values()) for weight in views.values()]
        shared = {id(weight.d): weight.d.nbytes for weight in weights if weight.d is not None}
        return sum(weight.qweight.nbytes + weight.scale.nbytes for weight in weights) + sum(shared.values())

    def _refresh(
        self,
        parameter: Tensor,
        key: Key,
        path: str,
        given: Sequence[Tensor],
        group: Members,
        among: Members,
        each: bool,
    ) -> QuantizedWeight:
        view, packed, _ = key
        known = self.weights(parameter).get(key)
        if known is not None and known.is_of(parameter, given):
            return known  # Another thread was faster.
        if isinstance(parameter, FREED):
            if known is None or not given or not view.is_all_of(parameter):
                raise FreedWeightError(f"{path}: its weight was freed before this view of it was taken")
            # Only the int8 weight is left of the parameter; its scales or its d are new.
            scale, *its_d = given
            d = its_d[0] if its_d else None
            made = QuantizedWeight(known.qweight, scale.detach(), d, known.made_of, tuple(map(Snapshot, given)))
            self._keep(parameter, key, made)
            return made
        check_data(parameter, path)
        made_of, made_with = Snapshot(parameter), tuple(map(Snapshot, given))
        if not given:
            d = self.share(group, among, each=each) if group else None
            qweight, scale = quantize_checked(parameter, view, path, d)
            self.quantized += 1
        else:
            scale, *its_d = given
            qweight, scale, d = view_of_int8(parameter, scale, its_d[0] if its_d else None, view)
        if packed:
            with _plain_tensors():
                qweight = pack_weight(qweight)
        if parameter.is_inference():
            warnings.warn(
                f"{path}: its weight was made in inference mode and has no version counter, so updates of a few "
                "elements, and any on a GPU, are not noticed before something is compiled. Make the model outside of "
                "inference mode, or call int8compile.refresh(model) after an update",
                Int8Warning,
                stacklevel=2,
            )
        # Graphs hold the address of d, too, so a weight with a new d gets new tensors.
        same_d = known is not None and known.d is d
        if known is not None and same_d and parameter.device.type in IN_PLACE and known.made_of.same_memory(made_of):
            with _plain_tensors():
                known.qweight.copy_(qweight)
                known.scale.copy_(scale)
            known.made_of, known.made_with = made_of, made_with
            return known
        made = QuantizedWeight(qweight, scale, d, made_of, made_with)
        self._keep(parameter, key, made)
        return made

    def _keep(self, parameter: Tensor, key: Key, weight: QuantizedWeight) -> None:
        _watch_optimizers()
        identity, storage = id(parameter), parameter.untyped_storage()
        if not self.weights(parameter):
            self._parameters[identity] = (weakref.ref(storage, lambda ref: self._drop(identity, ref)), {})
        self._parameters[identity][1][key] = weight

    def _drop(self, identity: int, ref: weakref.ref[UntypedStorage]) -> None:
        # A newer parameter may have the same identity by now.
        if identity in self._parameters and self._parameters[identity][0] is ref:
            del self._parameters[identity]


def joined(tensors: Sequence[Tensor], *, interleaved: bool) -> Tensor:
    """Return weights, or their scales, as one tensor: concatenated, or with their rows interleaved."""
    return torch.stack(list(tensors), dim=1).flatten(0, 1) if interleaved else torch.cat(list(tensors))


def _fuse(weights: Sequence[QuantizedWeight], interleaved: bool) -> FusedWeight:
    def parts(tensor: Tensor, of: Sequence[Tensor]) -> Sequence[Tensor]:
        if interleaved:
            return list(tensor.unflatten(0, (-1, len(of))).unbind(dim=1))
        return list(tensor.split([each.shape[0] for each in of]))

    qweights, scales = [weight.qweight for weight in weights], [weight.scale for weight in weights]
    members = tuple(map(weakref.ref, weights))
    fused = FusedWeight(
        joined(qweights, interleaved=interleaved), joined(scales, interleaved=interleaved), interleaved, members
    )
    slices = zip(weights, parts(fused.qweight, qweights), parts(fused.scale, scales), strict=True)
    for weight, qweight, scale in slices:
        weight.qweight, weight.scale, weight.fused = qweight, scale, fused
    return fused


def check_data(parameter: Tensor, path: str) -> None:
    """Raise `BadWeightError` for a parameter that has no data."""
    if parameter.is_meta:
        raise BadWeightError(
            f"{path}: its weight {list(parameter.shape)} is on the meta device and has no data. Load the weights "
            "(or model.to_empty and initialize them) before calling the compiled model"
        )


def rotation_of_view(parameter: Tensor, view: WeightView) -> Rotation | None:
    """Return the rotation of a view of a parameter, None if it has none yet."""
    rotations: dict[WeightView, Rotation] = vars(parameter).get(_ROTATIONS, {})
    rotation = rotations.get(view)
    # The parameter may have got another shape since.
    return rotation if rotation is not None and rotation.d.shape[-1] == view.shape[-1] else None


def rotations_of(parameter: Tensor) -> dict[WeightView, Rotation]:
    """Return the rotations of a parameter by view, for `put_rotations`."""
    return dict(vars(parameter).get(_ROTATIONS, {}))


def put_rotations(parameter: Tensor, rotations: Mapping[WeightView, Rotation]) -> None:
    """Replace the rotations of a parameter by those that `rotations_of` returned, and forget its int8 weights."""
    STORE.forget(parameter)
    vars(parameter)[_ROTATIONS] = _Rotations(rotations)


def _chosen(members: Members, known: Sequence[Rotation | None]) -> Rotation | None:
    """Return the rotation that all of some weights get; None if none of them has one."""
    present = dict.fromkeys(rotation for rotation in known if rotation is not None)
    freed = [rotation for (parameter, _), rotation in zip(members, known, strict=True) if isinstance(parameter, FREED)]
    if len({id(rotation.d) for rotation in freed if rotation is not None}) > 1:
        raise FreedWeightError(
            "two weights that a graph multiplies by one x were rotated differently and then freed. Compile them "
            "together from the start, or compile without free_weights"
        )
    order = sorted(present, key=lambda rotation: (rotation not in freed, not rotation.calibrated, rotation.number))
    return order[0] if order else None


def quantize_checked(parameter: Tensor, view: WeightView, path: str, d: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rotate and quantize a view of a parameter.

    Args:
        parameter: The parameter.
        view: The weight as a view of it.
        path: Module path, for messages.
        d: Its rotation, as `WeightStore.share` returns it.

    Returns:
        `qweight` int8 and `scale` float32, as `int8compile.ops.quantize_weight`.

    Raises:
        BadWeightError: The weight has NaN or Inf, or no data; or values so large that it has them when it is rotated.
    """
    check_data(parameter, path)
    with _plain_tensors():
        weight = view.of(parameter)
        qweight, scale = quantize_weight(weight, d)
        # A row with NaN or Inf has a scale that is not finite.
        if not scale.isfinite().all():
            bad = weight.numel() - int(weight.isfinite().sum())
            what = (
                f"{bad} NaN or Inf of {weight.numel()} entries, which have no int8 value"
                if bad
                else "values so large that rotating it overflows float32; rotate=False may do"
            )
            raise BadWeightError(
                f"{path}: its weight {list(parameter.shape)} has {what}. Repair the checkpoint, or leave it in float "
                f"with skip_modules=[{path!r}]"
            )
        return qweight, scale


def view_of_int8(
    qweight: Tensor, scale: Tensor, d: Tensor | None, view: WeightView
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return a view of a weight that is int8 already, its scales and its d.

    The view keeps the weight's integers if each row of the view lies in one row of the weight, and is the whole row if
    the weight is rotated. Otherwise, as for the transpose, the weight is dequantized and the view quantized again.
    """
    if view.is_all_of(qweight):
        return view.of(qweight), scale.detach(), d
    with _plain_tensors():
        same, matrix = rotation_in_view(qweight, d, view)
        row = torch.arange(scale.numel(), device=scale.device, dtype=torch.int32).view(*scale.shape, 1)
        # The view was made for the strides of the weight.
        rows = view.of(torch.empty_like(qweight, dtype=torch.int32).copy_(row))
        if same and bool((rows == rows[..., :1]).all()):
            its_d = d if d is None or matrix is None else d.flatten(0, -2)[matrix.to(d.device)]
            return view.of(qweight), scale.flatten()[rows[..., 0].long()], its_d
        weight = torch.empty_like(qweight, dtype=torch.float32)
        weight.copy_(dequantize_weight(qweight, scale, d, torch.float32))
        again = view.of(weight)
        new_d = None
        if d is not None and rotation_size(again.shape[-1]) > 1:
            new_d = make_d([again], each=again.dim() == 3)
        return *quantize_weight(again, new_d), new_d


@contextlib.contextmanager
def _plain_tensors() -> Iterator[None]:
    """Create ordinary tensors inside, in any mode outside.

    Inference tensors can be neither saved for a backward pass nor refreshed in place, and torch.func wraps tensors.
    """
    with torch.inference_mode(False), torch.no_grad(), torch._C._DisableFuncTorch():
        yield


def free(parameter: Tensor) -> None:
    """Release the memory of a parameter or buffer; using it afterwards raises `FreedWeightError`."""
    if isinstance(parameter, FREED):
        return
    # The parameter keeps its sizes and strides, which Dynamo's guards compare. It gets a new storage without memory,
    # because other tensors may share the old one (a file mapped as a whole).
    empty = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device=parameter.device)
    empty.untyped_storage().resize_(0)
    # The class first: torch reads a tensor without memory unchecked, but asks a subclass before every operation.
    with STORE.kept(parameter), torch._C.DisableTorchFunctionSubclass():
        parameter.__class__ = FreedWeight if isinstance(parameter, nn.Parameter) else FreedBuffer
        parameter.data = empty


STORE = WeightStore()


@functools.cache
def _watch_optimizers() -> None:
    """Have every step of an optimizer, from now on, forget the weights that it updated."""
    register_optimizer_step_post_hook(_forget_updated)


def _forget_updated(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Mark what a step has updated: fused optimizers (`AdamW(fused=True)`) do not count up versions."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            STORE.forget(parameter)


def refresh(model: nn.Module) -> None:
    """Quantize every weight of a model again at the next call.

    Updates that PyTorch counts, optimizer steps, replaced `.data` and `load_state_dict` are noticed without it. So are,
    on a CPU, updates of a whole weight that PyTorch does not count: `p.data.copy_()`, writes through NumPy or through
    another parameter that shares the memory, and writes to parameters made in inference mode. Call it after uncounted
    updates of a few elements, and on a GPU after any uncounted update. Compiling something notices those updates, too.
    """
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        STORE.forget(tensor)
