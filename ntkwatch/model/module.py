"""nn.Module → what the engines need: trained parameters by name, and outputs(model, batch) → [n, C]."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ntkwatch.guard import interruption
from ntkwatch.guard.default_device import users_default_device
from ntkwatch.model.batch import (
    Batch,
    batch_size,
    inputs_of,
    leaves,
    raw_of,
)
from ntkwatch.model.batch_reading import Reading
from ntkwatch.model.calling import Caller, form_of
from ntkwatch.model.output import UnsupportedModel, as_output, outputs_advice, rows_expression
from ntkwatch.model.parameters import check_devices, trained_parameters
from ntkwatch.model.shared_leaves import elsewhere, infer_rows
from ntkwatch.model.wrappers import attribute_paths, eager, not_reentrant, unfused, unwrap

OutputsFn = Callable[[nn.Module, Any], Tensor]


class _Forward(nn.Module):
    """Wraps a module so that `functional_call` reaches it through any `outputs` function."""

    def __init__(self, module: nn.Module, outputs: Callable[[Any], Any]) -> None:
        super().__init__()
        self.module = module
        self.outputs = outputs

    def forward(self, batch: Any) -> Any:
        return self.outputs(batch)


class Network:
    """The one seam between a module and everything downstream.

    Args:
        module: any nn.Module; a torch.compile'd or DDP-wrapped one is unwrapped.
        outputs: `outputs(module, batch) -> Tensor[n, C]`; None calls the module as `reading` says.
        params: names or globs among the trained parameters; None takes all of them.

    Raises:
        UnsupportedModel: no trained parameter, one that is not initialised yet (lazy modules), trained parameters on
            several devices, or numbers on the meta device.
        ValueError: a name or glob in `params` that matches no trained parameter.
    """

    def __init__(
        self, module: nn.Module, outputs: OutputsFn | None = None, params: str | Sequence[str] | None = None
    ) -> None:
        self.module = unwrap(module)
        self._outputs = outputs
        self.call = Caller(self.module)
        self._row_layouts: dict[
            Any, tuple[int, tuple[bool, ...]]
        ] = {}  # n, and which leaves have a row for each example
        self._wrapper = _Forward(self.module, self._raw)
        self.parameters: dict[str, Tensor] = trained_parameters(self.module, params)
        check_devices(self.module, self.parameters)
        self._place = ""  # of the output in what was returned last, in Python
        self.mixes: Network | None = None  # the network whose outputs this one mixes
        self.inside: frozenset[torch.dtype] = frozenset()  # types that a forward pass was seen to use (autocast)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Those of the module as they are now, by name: moving a module replaces them."""
        return dict(self.module.named_buffers())

    @property
    def device(self) -> torch.device:
        """Where the module is now."""
        return next(iter(self.parameters.values())).device

    def placed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by the names of parameters or buffers, each where the one that it stands for is, and of its type."""
        held = {**self.parameters, **self.buffers}
        return {name: tensor.to(held.get(name, tensor)) for name, tensor in tensors.items()}

    def rounding(self, outputs: torch.dtype) -> torch.dtype:
        """What outputs of that type are rounded to on their way: the coarsest of it, of all parameters and inside."""
        types = {p.dtype for p in self.module.parameters() if p.is_floating_point() or p.is_complex()} | self.inside
        return max((outputs, *types), key=lambda dtype: torch.finfo(dtype).eps)

    def check_parameters(self) -> None:
        """Raises UnsupportedModel where a trained parameter is no longer the one that was there at construction."""
        now = dict(self.module.named_parameters(remove_duplicate=False))
        gone = [name for name, parameter in self.parameters.items() if now.get(name) is not parameter]
        if gone:
            raise UnsupportedModel(
                f"{', '.join(gone[:3])} {'is' if len(gone) == 1 else 'are'} no longer the parameter that was there at "
                "the start (replaced, renamed or pruned): later kernels cannot be compared with the first"
            )

    def unfrozen(self) -> list[str]:
        """Names of parameters that train now and did not at construction, or are new."""
        known = {id(parameter) for parameter in self.parameters.values()}
        return [name for name, p in self.module.named_parameters() if p.requires_grad and id(p) not in known]

    def outputs(self, batch: Any, state: Mapping[str, Tensor] | None = None) -> Tensor:
        """Outputs [n, C] of the batch, differentiable; `state` swaps parameters or buffers by name for this call."""
        interruption.check()
        return self._checked(self._run(batch, state), batch)

    def _run(self, batch: Any, state: Mapping[str, Tensor] | None = None) -> Tensor:
        """The output tensor as it is."""
        with eager(), not_reentrant(), unfused():
            try:
                return self._output(self._called(batch, state), batch)
            except RuntimeError as error:
                if torch.is_grad_enabled() or "does not require grad" not in str(error):
                    raise
            with torch.enable_grad():  # a model that differentiates on its way: energies, physics-informed losses
                f = self._output(self._called(batch, state), batch)
                return f if forward_ad._current_level >= 0 else f.detach()  # which would take a tangent with it

    def _output(self, result: Any, batch: Any) -> Tensor:
        found = as_output(result, self.code(batch), batch_size(inputs_of(batch)))
        self._place = found.place
        return found.tensor

    def _run_elsewhere(self, batch: Any) -> Tensor:
        return self._run(batch, elsewhere(self.parameters))

    def _called(self, batch: Any, state: Mapping[str, Tensor] | None) -> Any:
        places = attribute_paths(self.module) if state else {}
        swapped = {f"module.{place}": t for name, t in (state or {}).items() for place in places.get(name, (name,))}
        with users_default_device():
            if not state:
                return self._raw(batch)
            return torch.func.functional_call(self._wrapper, swapped, (batch,), tie_weights=False)

    @property
    def forms(self) -> tuple[Any, ...]:
        """What was learned of how batches go in, and of the types inside: of another Network of the same module too."""
        return dict(self._row_layouts), dict(self.call.known), self.inside

    @forms.setter
    def forms(self, learned: tuple[Any, ...]) -> None:
        """Restore what an earlier reading learned, as `forms` returned it."""
        self._row_layouts, self.call.known, self.inside = dict(learned[0]), dict(learned[1]), learned[2]

    @property
    def custom(self) -> OutputsFn | None:
        """The `outputs` that were given."""
        return self._outputs

    @property
    def custom_outputs(self) -> bool:
        """Whether the outputs are something else than the module called on the batch."""
        return self._outputs is not None or callable(getattr(self.module, "ntk_outputs", None))

    def code(self, batch: Any) -> str:
        """How outputs are had of a batch, in Python; `outputs` stands for a function of the user's own."""
        if self._outputs is not None:
            return "outputs(model, batch)"
        return "model.ntk_outputs(batch)" if self.custom_outputs else self.reading(batch).code()

    def _raw(self, batch: Any) -> Any:
        value = batch.fresh() if isinstance(batch, Batch) else batch
        if self._outputs is not None:
            return self._outputs(self.module, value)
        if callable(getattr(self.module, "ntk_outputs", None)):
            return self.module.ntk_outputs(value)  # type: ignore[operator]
        return self.call(value)

    # ── batches ───────────────────────────────────────────────────────────────────────────────────────────────────
    def reading(self, batch: Any) -> Reading:
        """What of a batch goes in, and what is the target."""
        return self.call.reading(raw_of(batch))

    def targets(self, batch: Any) -> Tensor | None:
        """The targets of a batch as they are there, None where there are none."""
        return self.reading(batch).targets(raw_of(batch))

    def batch(self, raw: Any) -> Batch:
        """The batch with what is known of its leaves; a few of its examples may be run, in the mode of now.

        Raises:
            ValueError: no tensor is among its inputs.
        """
        if isinstance(raw, Batch):
            return raw
        form = (form_of(raw), *(_length(leaf) for leaf in leaves(raw)))
        if form not in self._row_layouts:
            batch_size(inputs_of(raw))  # raises
            with torch.no_grad():
                found = infer_rows(raw, self._inputs(raw), self._run, self._run_elsewhere, self.tolerance)
            self._row_layouts[form] = (found.n, found.rows)
        return Batch.of(raw, *self._row_layouts[form])

    def _inputs(self, raw: Any) -> list[int]:
        """Numbers of the leaves that may go in and have rows, the one that n is read from first."""
        flat = leaves(raw)
        parts = inputs_of(raw)
        if not self.custom_outputs:
            if not self.call.is_unambiguous(raw):
                with contextlib.suppress(Exception):  # whoever runs it next says so
                    self._run(raw)
            parts = self.reading(raw).inputs(raw)
        first = [id(leaf) for leaf in leaves(parts)]
        going_in = [i for i, leaf in enumerate(flat) if self.custom_outputs or id(leaf) in first]
        going_in.sort(key=lambda i: first.index(id(flat[i])) if id(flat[i]) in first else len(first))
        found = [i for i in going_in if isinstance(flat[i], Tensor) and flat[i].ndim > 0]
        return found or [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor) and leaf.ndim > 0]

    def tolerance(self, f: Tensor) -> Tensor:
        """By how much outputs of the same examples may differ from run to run."""
        return torch.finfo(self.rounding(f.dtype)).eps ** 0.5 * f.abs().max()

    def _checked(self, result: Tensor, batch: Any) -> Tensor:
        f = whole = result
        if f.ndim == 1:
            f = f[:, None]
        n = batch_size(inputs_of(batch))
        if f.ndim != 2 or f.shape[0] != n or f.shape[1] == 0 or not f.is_floating_point():
            raise UnsupportedModel(
                f"the output must be real and [n, C] with n = {n} (or [n]), got {tuple(whole.shape)}, {f.dtype}; "
                f"{outputs_advice(rows_expression(whole, self.code(batch) + self._place, n))}"
            )
        return f


def _length(leaf: Any) -> int | None:
    """The first side of a leaf."""
    if isinstance(leaf, Tensor):
        return leaf.shape[0] if leaf.ndim else None
    return len(leaf) if isinstance(leaf, tuple | list) else None
