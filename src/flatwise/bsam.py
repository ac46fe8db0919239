"""bSAM (Möllenhoff and Khan, ICLR 2023, arXiv 2210.01620): an optimizer of its own.

With N training samples, prior precision delta (weight decay) and damping gamma, and all operations elementwise::

    theta = omega + n,  n ~ N(0, 1 / (N s))
    g     = gradient at theta
    eps   = rho g / s
    g'    = gradient at omega + eps
    m     <- beta1 m + (1 - beta1) (g' + delta omega)
    omega <- omega - lr m / s
    s     <- beta2 s + (1 - beta2) (sqrt(s) |g| + delta + gamma)

Outside ``step`` the weights are omega. The noise comes from a generator of its own, seeded by ``noise_seed`` and the
step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from flatwise.construct import checked_radius
from flatwise.guards import PassGuard
from flatwise.memory import STEP
from flatwise.nograd import no_grad
from flatwise.norms import COARSE, accumulation_dtype, all_finite, combine, joint_norm
from flatwise.passes import NO_GRADIENTS, first_pass, from_loss_fn, later_pass, of_lightning, refuse_stale_gradients
from flatwise.radius import as_auto
from flatwise.record import StepRecord
from flatwise.scaling import Scaling
from flatwise.schedule import StepNoise
from flatwise.shards import any_sharded
from flatwise.true_gradient import true_gradients
from flatwise.weights import Displacement, Piece

_NO_BATCH: Any = object()
_NO_CLOSURE = """bSAM needs two gradients per step, so opt.step() cannot work alone. Write one of:
    opt.step(closure)            # closure: opt.zero_grad(), forward, loss.backward(), return loss; runs twice
    opt.step(loss_fn, batch)     # loss_fn(batch) returns the mean loss; flatwise does the rest"""


class BSAM(Optimizer):
    """bSAM: Adam-like, with a diagonal Gaussian over the weights.

    Args:
        params: parameters or groups of them; real and dense.
        train_size: N, the number of training samples.
        lr: learning rate.
        rho: radius; the perturbation is ``rho g / s``, without a norm.
        betas: of the momentum and of the precision.
        weight_decay: delta, the precision of the prior.
        damping: gamma, > 0 or delta > 0, so that s stays away from 0.
        initial_precision: s before the first step. The paper does not fix it.
        noise_seed: seed of the noise.
        model: the module whose buffers to protect, where it cannot be found by watching. Not saved.
        fresh_masks: draw new dropout masks in the second pass instead of the same ones.
        grad_scaler: see :meth:`attach_scaler`.

    Raises:
        ValueError: if a number is out of its range.
    """

    last: StepRecord
    """What the latest step did."""

    wants_sample_losses = False
    """Whether ``loss_fn(batch)`` must return one loss for each sample, as for :class:`flatwise.SAM`."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        train_size: int,
        lr: float = 0.5,
        rho: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        damping: float = 0.1,
        initial_precision: float = 1.0,
        noise_seed: int = 0,
        model: Module | None = None,
        fresh_masks: bool = False,
        grad_scaler: Any = None,
    ) -> None:
        if not (isinstance(train_size, int) and train_size >= 1):
            raise ValueError(f"train_size must be the number of training samples, >= 1, got {train_size!r}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas!r}")
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("damping", damping)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
        if not (math.isfinite(initial_precision) and initial_precision > 0):
            raise ValueError(f"initial_precision must be a finite number > 0, got {initial_precision!r}")
        if as_auto(rho) is not None:
            raise ValueError("rho='auto' steers a ball around w, and bSAM has none: give rho a number")
        defaults = {
            "lr": lr, "rho": checked_radius(rho), "betas": betas, "weight_decay": weight_decay, "damping": damping,
            "initial_precision": initial_precision, "train_size": train_size, "noise_seed": noise_seed, STEP: 0,
        }  # fmt: skip
        super().__init__(params, defaults)
        if any(p.is_complex() for p in self._params()):
            raise ValueError("bSAM is defined for real parameters, and some are complex")
        if any_sharded(self._params()):
            raise ValueError("bSAM needs whole parameters, and some are cut by fully_shard or tensor parallelism")
        self._fresh_masks = fresh_masks
        self._wire(model)
        self.attach_scaler(grad_scaler)

    _step_supports_amp_scaling = True  # scaler.step(opt, closure) leaves the gradients to us

    def attach_scaler(self, grad_scaler: Any) -> None:
        """Work with losses that a ``torch.amp.GradScaler`` scales, as :meth:`flatwise.SAM.attach_scaler`.

        Args:
            grad_scaler: the scaler; None detaches it.
        """
        self._scaling.attach(grad_scaler, self._params()[0].device)

    def _wire(self, model: Module | None = None) -> None:
        self._scaling = Scaling()
        self.last = StepRecord()
        self._guard = PassGuard(self._params(), model, fresh_masks=self._fresh_masks)

    def __getstate__(self) -> dict[str, Any]:
        """Return what ``copy`` and ``pickle`` keep: everything but hooks, the guard and the latest record."""
        return {
            "defaults": self.defaults, "state": self.state, "param_groups": self.param_groups,
            "_fresh_masks": self._fresh_masks,
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, or what was loaded.

        Args:
            state: from :meth:`__getstate__`, or from ``load_state_dict``.
        """
        super().__setstate__(state)
        if "_guard" not in self.__dict__:
            self._wire()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; the state of half-precision parameters stays in float32.

        Args:
            state_dict: from :meth:`state_dict`.
        """
        super().load_state_dict(state_dict)  # torch rounds every state to the dtype of its parameter
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for param, key in zip(self._params(), keys, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if param.dtype in COARSE and isinstance(value, Tensor):
                    self.state[param][name] = value.detach().to(param.device, copy=True)

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _clear(self) -> None:
        for param in self._params():
            param.grad = None

    def step(self, closure: Any = None, batch: Any = _NO_BATCH) -> Any:
        """Take one step.

        Args:
            closure: as for :meth:`flatwise.SAM.step`; it runs twice.
            batch: as for :meth:`flatwise.SAM.step`.

        Returns:
            The loss at theta, detached; None for the dry step of torch.distributed.checkpoint.

        Raises:
            RuntimeError: if there is no closure, or it leaves no gradients.
        """
        if closure is None:
            moving = any(p.grad.any() for p in self._params() if p.grad is not None)
            if moving or any(group["lr"] for group in self.param_groups):
                raise RuntimeError(_NO_CLOSURE)
            for group in self.param_groups:  # lr = 0: torch.distributed.checkpoint makes an optimizer create its state
                for param in group["params"]:
                    self._state(param, group)
            return None
        if of_lightning(closure):
            raise RuntimeError(
                "bSAM cannot serve the Trainer's automatic optimization, whose pass cannot run twice: "
                "set automatic_optimization = False, and call opt.step(closure) in training_step"
            )
        own, scaling = batch is not _NO_BATCH, self._scaling
        scaling.through_scaler(self)
        scaling.begin()
        run: Callable[[], Any] = from_loss_fn(closure, batch, self._clear, scaled=scaling.scaled) if own else closure
        step = int(self.param_groups[0][STEP])
        rhos = [checked_radius(group["rho"]) for group in self.param_groups]
        self.last = record = StepRecord(step=step, rho=max(rhos))
        displacement, guard = Displacement(), self._guard
        guard.await_verdict(scaling.on)
        guard.enter_step()
        try:
            try:
                displacement.add(self._noise(step), 1.0)
                torch.clear_autocast_cache()
                with nullcontext() if own else refuse_stale_gradients(self.param_groups), true_gradients():
                    record._loss = loss = first_pass(run)
                scaling.unscale(self.param_groups)
                displacement.undo()
                guard.first_pass_done()
                guard.between()
                first = {p: p.grad for p in self._params() if p.grad is not None}
                if not first:
                    raise RuntimeError(NO_GRADIENTS)
                self._clear()
                record._norm = record._gradient_norm = joint_norm(list(first.values()))
                self._displace(displacement, first, record)
                torch.clear_autocast_cache()
                record._perturbed_loss = later_pass(run)
                scaling.unscale(self.param_groups)
                record.passes, record.closure_calls = 2.0, 2
            finally:
                self._close(displacement)
        finally:  # an interrupt can come between the lines of the one above; closing again does no harm
            self._close(displacement)
        self._update(first, record)
        guard.settle(record._finite)
        scaling.end()
        for group in self.param_groups:
            group[STEP] += 1
        return loss

    def _close(self, displacement: Displacement) -> None:
        displacement.undo()
        torch.clear_autocast_cache()
        self._guard.close()

    def _state(self, param: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        state = self.state[param]
        if "precision" not in state:
            # The precision moves by thousandths in a step, which half precision would round away.
            dtype = accumulation_dtype(param.dtype)
            state["precision"] = torch.full_like(param, group["initial_precision"], dtype=dtype)
            state["momentum"] = torch.zeros_like(param, dtype=dtype)
        return state["momentum"], state["precision"]

    @no_grad
    def _noise(self, step: int) -> list[Piece]:
        draws: dict[int, StepNoise] = {}
        pieces = []
        for group in self.param_groups:
            seed = group["noise_seed"]
            for param in group["params"]:
                if not (param.requires_grad and param.numel()):
                    continue
                generator = draws.setdefault(seed, StepNoise(seed, step)).generator(param.device)
                _, precision = self._state(param, group)
                noise = torch.randn(param.shape, generator=generator, dtype=precision.dtype, device=param.device)
                noise.div_((group["train_size"] * precision).sqrt_())
                pieces.append(Piece(param, noise, param, noise))
        return pieces

    @no_grad
    def _displace(self, displacement: Displacement, first: dict[Tensor, Tensor], record: StepRecord) -> None:
        norms = []
        for group in self.param_groups:
            if group["rho"] == 0:
                continue
            for param in group["params"]:
                if param in first and param.numel():
                    eps = first[param] * group["rho"] / self._state(param, group)[1]
                    norms.append(joint_norm([eps]))
                    finite = torch.isfinite(norms[-1])
                    displacement.add([Piece(param, torch.where(finite, eps, 0), param, eps)], 1.0)
        if norms:
            length = combine(norms, 2.0)
            record._radius = lambda: float(length)
        else:
            record._reason = "zero radius"

    @no_grad
    def _update(self, first: dict[Tensor, Tensor], record: StepRecord) -> None:
        present = [p.grad for p in self._params() if p.grad is not None]
        record._finite = finite = all_finite([*first.values(), *present])
        if finite is False:
            return
        for group in self.param_groups:
            (beta1, beta2), decay = group["betas"], group["weight_decay"]
            for param in group["params"]:
                grad, at_theta = param.grad, first.get(param)
                if grad is None or at_theta is None:
                    continue
                momentum, precision = self._state(param, group)
                new = beta1 * momentum + (1 - beta1) * (grad + decay * param)
                moved = param - group["lr"] * new / precision
                growth = precision.sqrt() * at_theta.abs() + decay + group["damping"]
                sharper = beta2 * precision + (1 - beta2) * growth
                for kept, value in ((momentum, new), (param, moved), (precision, sharper)):
                    if isinstance(finite, Tensor):
                        value = torch.where(finite.to(value.device), value, kept)
                    kept.copy_(value)
