"""Saving, loading and copying an optimizer: the standard form of ``torch.optim``, with what a method remembers."""

from __future__ import annotations

from typing import Any

from flatwise.memory import PREFIX, split_state
from flatwise.wiring import Wired


class Saving(Wired):
    """An optimizer that is saved as its base is."""

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state, with radii and step count in its groups; no copies of weights.

        Returns:
            A dictionary in the standard form of ``torch.optim``.

        Raises:
            RuntimeError: if the weights are perturbed: what is saved now would be saved beside wrong weights.
        """
        if self._look is not None:
            raise RuntimeError("state_dict() while the weights are perturbed: call opt.restore() first")
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        saved = self.base_optimizer.state_dict()
        for index, entries in self._memory.save(self.param_groups).items():
            saved["state"][index] = {**saved["state"].get(index, {}), **entries}
        for after in self._optimizer_state_dict_post_hooks.values():
            saved = after(self, saved) or saved
        return saved

    def base_state_dict(self) -> dict[str, Any]:
        """Return a checkpoint of the plain base optimizer, without flatwise's entries.

        Returns:
            A dictionary that the base's class loads.
        """
        saved = self.state_dict()
        saved["state"], _ = split_state(saved["state"])
        saved["param_groups"] = [
            {k: v for k, v in g.items() if k != self._rho_key and not k.startswith(PREFIX)}
            for g in saved["param_groups"]
        ]
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, or of the plain base optimizer (radii stay as they are then).

        Args:
            state_dict: from :meth:`state_dict`, or from the base's class.
        """
        radii = [group.get("sam_rho_max", group[self._rho_key]) for group in self.param_groups]
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        base_state, own_state = split_state(state_dict["state"])
        self.base_optimizer.load_state_dict({**state_dict, "state": base_state})
        self._memory.load(self.param_groups, own_state, state_dict["param_groups"])
        for group, radius in zip(self.param_groups, radii, strict=True):
            group.setdefault(self._rho_key, radius)
        self._adopt_groups()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return what ``copy`` and ``pickle`` keep: everything but hooks, the guard and the latest record."""
        if self._look is not None:
            raise RuntimeError("copying the optimizer while the weights are perturbed: call opt.restore() first")
        kept = ("base_optimizer", "defaults", "_rho_function", "_auto", "_rho_key", "_fixed", "_default_rho")
        slots = ("_ascent", "_descent", "_schedule", "_batching", "_selection", "_memory")
        options = ("_fresh_masks", "_max_grad_norm", "_sync_ascent")
        return {name: self.__dict__[name] for name in (*kept, *slots, *options)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy.

        Args:
            state: from :meth:`__getstate__`.
        """
        self.__dict__.update(state)
        super().__setstate__({})  # torch's hooks
        self._wire(self._default_rho)
