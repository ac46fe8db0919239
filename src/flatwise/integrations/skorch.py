"""skorch: ``on_grad_computed`` once a step, with the gradient that the base optimizer is given.

skorch hands the optimizer a closure, so ``optimizer=flatwise.SAM`` works in any net, and its history holds the loss at
w. But in a plain net the closure announces the gradient of every pass, and a callback that clips would clip each.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from flatwise.integrations.replay import find_sam
from flatwise.optimizer import SAM

try:
    from skorch import NeuralNetClassifier, NeuralNetRegressor
    from skorch.utils import TeeGenerator
except ImportError as error:
    raise ImportError('SAM in skorch needs skorch: pip install "flatwise[skorch]"') from error

NO_SAM = """the optimizer is no flatwise.SAM, which SAMNetMixin is for:
    SAMNetClassifier(Net, optimizer=flatwise.SAM, optimizer__base_optimizer=torch.optim.SGD, optimizer__rho=0.05)"""

ACCELERATE = """skorch's AccelerateMixin steps without a closure, and leaves no place for a second pass: use \
SAMNetMixin without it, or Accelerate without skorch"""


class SAMNetMixin:
    """Makes a net announce its gradient once a step: ``class MyNet(SAMNetMixin, NeuralNet)``."""

    def train_step(self, batch: Any, **fit_params: Any) -> Any:
        """Take a step.

        Args:
            batch: of the data loader.
            **fit_params: for the module.

        Returns:
            The loss and the prediction at w, as skorch's own does.

        Raises:
            TypeError: if an optimizer is no :class:`flatwise.SAM`.
        """
        net: Any = self
        first = net.get_train_step_accumulator()

        def closure() -> Any:
            net._zero_grad_optimizer()
            step = net.train_step_single(batch, **fit_params)
            first.store_step(step)
            return step["loss"]

        def announce(*_: Any) -> None:
            # Before the base's step: all passes are made, and the weights are at w.
            parameters = TeeGenerator(net.get_all_learnable_params())
            net.notify("on_grad_computed", named_parameters=parameters, batch=batch, training=True)

        with ExitStack() as stack:
            for name in net._optimizers:
                optimizer = getattr(net, f"{name}_")
                if not isinstance(optimizer, SAM):
                    raise TypeError(NO_SAM if find_sam(optimizer) is None else ACCELERATE)
                stack.callback(optimizer.base_optimizer.register_step_pre_hook(announce).remove)
            net._step_optimizer(closure)
        return first.get_step()


class SAMNetClassifier(SAMNetMixin, NeuralNetClassifier):  # type: ignore[misc]
    """skorch's classifier with :class:`SAMNetMixin`."""


class SAMNetRegressor(SAMNetMixin, NeuralNetRegressor):  # type: ignore[misc]
    """skorch's regressor with :class:`SAMNetMixin`."""
