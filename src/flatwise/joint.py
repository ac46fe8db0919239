"""Several base optimizers under one perturbation: a backbone with SGD and a head with Adam, say."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class Joint(Optimizer):
    """Optimizers that step together, with their groups and states side by side.

    Args:
        bases: ready optimizers of different parameters.

    Raises:
        ValueError: if two of them have a parameter in common.
    """

    bases: list[Optimizer]
    _wired = False

    def __init__(self, bases: Sequence[Optimizer]) -> None:
        self.bases = list(bases)
        params = self._params()
        if len(set(params)) < len(params):
            raise ValueError("a parameter belongs to two of the base optimizers: give each parameter to one of them")
        self._groups = len(self._all_groups())
        defaults: dict[str, Any] = {}
        for base in reversed(self.bases):  # where they differ, the first is asked
            defaults.update(base.defaults)
        super().__init__(self._all_groups(), defaults)
        self._wired = True

    def _all_groups(self) -> list[dict[str, Any]]:
        return [group for base in self.bases for group in base.param_groups]

    def _params(self) -> list[Tensor]:
        return [param for group in self._all_groups() for param in group["params"]]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all of them, in their order.

        Raises:
            RuntimeError: if a group was added to one of them since.
        """
        groups = self._all_groups()
        if len(groups) != self._groups:
            raise RuntimeError(
                "a parameter group was added to one of several base optimizers: make the SAM over them anew, "
                "and load its state"
            )
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._refuse_new("param_groups")

    @property
    def state(self) -> Any:
        """The states of all of them, by parameter; the entries are their own."""
        return MappingProxyType({param: entries for base in self.bases for param, entries in base.state.items()})

    @state.setter
    def state(self, state: Any) -> None:
        self._refuse_new("state")

    def _refuse_new(self, name: str) -> None:
        if self._wired:  # torch's constructor sets both
            raise RuntimeError(f"several base optimizers have a {name} each: set that of one of them")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: whose would it be?

        Args:
            param_group: the group.

        Raises:
            RuntimeError: always, once the optimizer is made.
        """
        if self._wired:
            raise RuntimeError(
                "several base optimizers cannot take a parameter group: add it to one of them before SAM is made"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients.

        Args:
            set_to_none: remove them instead of filling them with zeros.
        """
        for base in self.bases:
            base.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Let each of them step.

        Args:
            closure: not used; there to agree with torch.
        """
        for base in self.bases:
            base.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all of them in the standard form, parameters counted through.

        Returns:
            A dictionary as ``torch.optim`` makes it.
        """
        whole: dict[str, Any] = {"state": {}, "param_groups": []}
        for base in self.bases:
            shift = sum(len(group["params"]) for group in whole["param_groups"])
            saved = base.state_dict()
            whole["state"].update({key + shift: entries for key, entries in saved["state"].items()})
            whole["param_groups"] += [
                {**group, "params": [key + shift for key in group["params"]]} for group in saved["param_groups"]
            ]
        return whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each of them its part.

        Args:
            state_dict: from :meth:`state_dict`; parameters are matched by their order.

        Raises:
            ValueError: if the number of groups is another one.
        """
        groups = state_dict["param_groups"]
        if len(groups) != self._groups:
            raise ValueError(f"the checkpoint has {len(groups)} parameter groups, the base optimizers {self._groups}")
        begin = 0
        parts = []
        for base in self.bases:
            mine = groups[begin : begin + len(base.param_groups)]
            begin += len(mine)
            keys = {key for group in mine for key in group["params"]}
            sizes = [len(group["params"]) for group in base.param_groups]
            if sizes != [len(group["params"]) for group in mine]:  # before any of them is changed
                raise ValueError("the checkpoint's parameter groups have other sizes than those of the base optimizers")
            parts.append(({k: v for k, v in state_dict["state"].items() if k in keys}, mine))
        for base, (state, mine) in zip(self.bases, parts, strict=True):
            base.load_state_dict({"state": state, "param_groups": mine})

    def __getstate__(self) -> dict[str, Any]:
        """Return what ``copy`` and ``pickle`` keep."""
        return {"bases": self.bases, "defaults": self.defaults, "_groups": self._groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy.

        Args:
            state: from :meth:`__getstate__`.
        """
        self.__dict__.update(state)
        super().__setstate__({})
        self._wired = True
