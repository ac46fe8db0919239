"""What a second pass must not leave behind: buffers updated twice, random numbers drawn twice.

After a step, BatchNorm statistics and every other buffer, and torch's random state, are those of one plain pass.

Modules are found without being told. Until every parameter of the optimizer has been seen inside a module that was
called, a global forward hook notes the outermost modules; then it goes away. A function that was compiled before
hides its modules from that hook: there, and where a module is replaced later, pass ``model=``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook

from flatwise.nograd import no_grad

LARGE = 1 << 20
"""Buffers above this many bytes (masks, tables) are copied only if the first pass was seen to write them.

Smaller ones are always copied: eager BatchNorm on the CPU writes its statistics without raising their version.
"""


class RandomState:
    """The state of torch's generators: the CPU's, and those of the devices in use."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._others = [
            (device, torch.get_device_module(device.type).get_rng_state(device))
            for device in devices
            if device.type not in ("cpu", "meta")
        ]

    def put(self) -> None:
        """Set the generators to this state."""
        torch.set_rng_state(self._cpu)
        for device, state in self._others:
            torch.get_device_module(device.type).set_rng_state(state, device)


class _Start:
    """A forward pre-hook that tells the guard when a pass begins. Copied or pickled with a model it does nothing."""

    def __init__(self, guard: PassGuard) -> None:
        self._guard = weakref.ref(guard)

    def __call__(self, module: Module, args: Any) -> None:
        guard = self._guard()
        if guard is not None:
            guard.saw(module)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_nothing_to_start, ())


def ignore_start(module: Module, args: Any) -> None:
    """Do nothing: what is left of the hook in a copied or pickled model."""


def _nothing_to_start() -> Any:
    return ignore_start


class PassGuard:
    """Makes the second pass of a step leave no trace in buffers and random state.

    Used as ``start()``, first pass, ``between()``, second pass, ``end()``. In the forms of call where the first pass
    happens outside flatwise, a forward hook calls ``start()``.

    Args:
        params: the optimizer's parameters.
        model: the module that holds all buffers, or None to find the modules by watching.
        fresh_masks: draw new random numbers in the second pass instead of the same.
    """

    def __init__(self, params: Iterable[Tensor], model: Module | None, *, fresh_masks: bool = False) -> None:
        self.fresh_masks = fresh_masks
        self._params: list[Tensor] = []
        self._devices: set[torch.device] = set()
        self._roots: list[weakref.ref[Module]] = []
        self._seen: set[int] = set()
        self._unseen_params: set[int] = set()
        self._holders: list[Module] | None = None
        self._begun: RandomState | None = None
        self._versions: dict[int, int] = {}
        self._kept: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._after: RandomState | None = None
        self._watch: Any = None
        self._root_hooks: list[Any] | None = None
        self._in_step = False
        self._initial: list[tuple[Tensor, Tensor]] | None = None
        if model is not None:
            self._add_root(model)
            self.listen_to_roots()
        self.expect(params)

    def expect(self, params: Iterable[Tensor]) -> None:
        """Look for the modules of these parameters during the next pass.

        Args:
            params: parameters of the optimizer.
        """
        new = list(params)
        self._params += new
        self._devices |= {p.device for p in new}
        covered = {id(p) for root in self.modules() for p in root.parameters()}
        self._unseen_params |= {id(p) for p in new} - covered
        self._holders = None
        if self._watch is None and self._unseen_params:
            self._watch = register_module_forward_pre_hook(_Start(self))
            weakref.finalize(self, self._watch.remove)

    def modules(self) -> list[Module]:
        """Return the outermost modules that are known."""
        return [module for ref in self._roots if (module := ref()) is not None]

    def _add_root(self, module: Module) -> None:
        self._roots.append(weakref.ref(module))
        self._seen |= {id(m) for m in module.modules()}
        self._unseen_params -= {id(p) for p in module.parameters()}
        self._holders = None
        if self._root_hooks is not None:
            self._root_hooks.append(module.register_forward_pre_hook(_Start(self)))

    def know(self, model: Module) -> None:
        """Take a module as known, and stop watching all others if it holds every parameter.

        Args:
            model: an outermost module.
        """
        if id(model) not in self._seen:
            self._add_root(model)
            self.listen_to_roots()
            self.first_pass_done()

    def saw(self, module: Module) -> None:
        """Note that a module is being called. Outermost modules come before the modules inside them."""
        if id(module) not in self._seen:
            self._add_root(module)
            if self._in_step:
                self._remember_buffers()
        if not self._in_step and self._begun is None and torch.is_grad_enabled():
            self.start()

    def start(self) -> None:
        """Remember the state at the beginning of the first pass."""
        if self._params and self._params[0].device not in self._devices:  # the model was moved since
            self._devices = {p.device for p in self._params}
        self._begun = RandomState(self._devices)
        self._versions = {id(b): b._version for _, _, b in self._buffers() if b.nbytes > LARGE}

    def forget_start(self) -> None:
        """Let the next call of a module begin a new first pass."""
        if not self._in_step:
            self._begun = None

    def enter_step(self, *, replays: bool = True) -> None:
        """Stop listening to modules: flatwise itself runs the passes.

        Args:
            replays: whether a second pass may follow, which needs the state at the beginning of the first.
        """
        self._in_step = True
        if replays:
            self.start()
        self._remember_buffers()

    def await_verdict(self, wanted: bool) -> None:
        """Let the step that comes keep copies of the buffers until :meth:`settle`, or not.

        Args:
            wanted: whether a verdict will follow.
        """
        self._initial = [] if wanted else None  # copies of a step that failed are gone

    def _remember_buffers(self) -> None:
        if self._initial is not None:
            known = {id(b) for b, _ in self._initial}  # the parts of a batch follow each other
            self._initial += [(b, b.detach().clone()) for _, _, b in self._buffers() if id(b) not in known]

    @no_grad
    def settle(self, finite: Tensor | bool | None) -> None:
        """Decide, after the last pass, whether what the step did to buffers stays.

        Args:
            finite: False brings the buffers back to where they were before the step; a tensor is not read.
        """
        initial, self._initial = self._initial or (), None
        for buffer, before in initial:
            if isinstance(finite, Tensor):
                buffer.copy_(torch.where(finite.to(buffer.device), buffer, before))
            elif finite is False:
                buffer.copy_(before)

    def close(self, *, keep_random: bool = False) -> None:
        """End the second pass and leave the step. Safe to call again.

        Args:
            keep_random: as for :meth:`end`.
        """
        self.end(keep_random=keep_random)
        self.leave_step()

    def leave_step(self) -> None:
        """Listen again, and forget what was kept."""
        self._in_step = False
        self._begun = self._after = None
        self._kept, self._copies = [], []

    def first_pass_done(self) -> None:
        """Stop watching all modules once every parameter has been seen."""
        if self._watch is not None and not self._unseen_params:
            self._watch.remove()
            self._watch = None

    def listen_to_roots(self) -> None:
        """Learn from the outermost modules when a first pass begins outside flatwise."""
        if self._root_hooks is None:
            self._root_hooks = [m.register_forward_pre_hook(_Start(self)) for m in self.modules()]
            for hook in self._root_hooks:
                weakref.finalize(self, hook.remove)

    def between(self) -> None:
        """Copy the buffers as the first pass left them, and rewind the random state."""
        self._in_step = True
        self._kept = self._buffers()
        self._copies = [
            (b, b.clone()) for _, _, b in self._kept if b.nbytes <= LARGE or self._versions.get(id(b)) != b._version
        ]
        self._after = RandomState(self._devices)
        self.rewind()

    def rewind(self, *, always: bool = False) -> None:
        """Set the random state to the beginning of the first pass, unless new masks are wanted.

        Args:
            always: also then.
        """
        if self._begun is not None and (always or not self.fresh_masks):
            self._begun.put()

    @no_grad
    def end(self, *, keep_random: bool = False) -> None:
        """Put buffers and random state back to where the first pass left them. Safe to call twice.

        Args:
            keep_random: leave the random state alone (the first pass saw only a part of the batch).
        """
        for holder, name, buffer in self._kept:
            if holder.get(name) is not buffer:
                holder[name] = buffer  # the second pass bound a new tensor to the name
        for buffer, copy in self._copies:
            buffer.copy_(copy)
        if self._after is not None and not keep_random:
            self._after.put()

    def _buffers(self) -> list[tuple[dict[str, Tensor | None], str, Tensor]]:
        if self._holders is None:
            found = {id(m): m for root in self.modules() for m in root.modules() if m._buffers}
            self._holders = list(found.values())
        seen: set[int] = set()
        result: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
        for module in self._holders:
            if isinstance(module, _NormBase) and not module.training:
                continue  # frozen statistics are only read
            for name, buffer in module._buffers.items():
                if buffer is not None and id(buffer) not in seen:
                    seen.add(id(buffer))
                    result.append((module._buffers, name, buffer))
        return result
