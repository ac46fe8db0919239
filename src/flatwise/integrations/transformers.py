"""Hugging Face Trainer: the second pass after the last micro-batch of every step.

The Trainer calls ``optimizer.step()`` by itself, without a closure, and calls ``training_step`` once for every
micro-batch before it. There the second pass is made; clipping, scaling, counting and saving stay the Trainer's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from flatwise.integrations.accelerate import SAMStep, refuse_engine
from flatwise.integrations.replay import find_sam
from flatwise.optimizer import SAM

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError(
        'the Trainer with SAM needs transformers and accelerate: pip install "flatwise[huggingface]"'
    ) from error


_TWICE = "sam= and an optimizer that is a flatwise.SAM already were both given: leave one of them out"


class SAMTrainerMixin:
    """Makes a Trainer sharpness-aware: ``class MyTrainer(SAMTrainerMixin, Trainer)``.

    The optimizer that the Trainer makes, or was given, is wrapped, unless it is a :class:`flatwise.SAM` already. The
    logged ``loss`` is that at w; beside it ``sharpness`` is the mean rise of the loss in the perturbed steps.

    Args:
        *args: for the Trainer.
        sam: rho, or a function that wraps the base optimizer, such as
            ``lambda base: flatwise.create("asam", base, rho=0.5)``; by default rho = 0.05.
        **kwargs: for the Trainer.

    Raises:
        ValueError: if DeepSpeed or Megatron-LM owns the optimizer, or ``sam`` is given beside an optimizer that is a
            :class:`flatwise.SAM` already.
    """

    optimizer: Any
    accelerator: Any
    args: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse the mixin behind the Trainer, where it would do nothing."""
        super().__init_subclass__(**kwargs)
        if Trainer in cls.__mro__ and cls.__mro__.index(Trainer) < cls.__mro__.index(SAMTrainerMixin):
            raise TypeError("SAMTrainerMixin comes before the Trainer: class MyTrainer(SAMTrainerMixin, Trainer)")

    def __init__(self, *args: Any, sam: float | Callable[[Optimizer], SAM] | None = None, **kwargs: Any) -> None:
        self._sam = sam
        self._sam_step: SAMStep | None = None
        self._rise: Tensor | float = 0.0
        self._rises = 0
        super().__init__(*args, **kwargs)
        refuse_engine(self.accelerator)
        if sam is not None and find_sam(self.optimizer) is not None:
            raise ValueError(_TWICE)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the Trainer's optimizer and wrap it, unless that was done.

        Args:
            *args: for the Trainer.
            **kwargs: for the Trainer.

        Returns:
            The optimizer.

        Raises:
            ValueError: if it steps inside of backward, or ``sam`` is given and it is a :class:`flatwise.SAM` already.
        """
        self._sam_step = None  # a training begins; what is left of one that was interrupted is forgotten
        self._rise, self._rises = 0.0, 0
        known = self.optimizer
        base = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if find_sam(base) is not None:
            if known is None and self._sam is not None:
                raise ValueError(_TWICE)
            return base
        if type(base).__name__ in ("LayerWiseDummyOptimizer", "Lomo", "AdaLomo"):
            raise ValueError(
                f"optim={self.args.optim.value!r} moves weights inside of backward, so there is no step between two "
                "passes: choose an optimizer that steps after it"
            )
        self.optimizer = self._sam(base) if callable(self._sam) else SAM(base, 0.05 if self._sam is None else self._sam)
        return self.optimizer

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run a micro-batch, and the second pass after the last one of a step.

        Args:
            model: as the Trainer wrapped it.
            *args: for the Trainer.
            **kwargs: for the Trainer.

        Returns:
            The loss at w, detached.
        """
        if self._sam_step is None:
            self._sam_step = SAMStep(self.accelerator, model, self.optimizer)
        run = super().training_step  # type: ignore[misc]
        loss = self._sam_step.run(lambda: run(model, *args, **kwargs))
        last = self._sam_step.last
        if self.accelerator.sync_gradients and last._perturbed_loss is not None and last._loss is not None:
            self._rise, self._rises = self._rise + (last._perturbed_loss - last._loss), self._rises + 1
        return loss

    @property
    def second_pass(self) -> bool:
        """Whether the model is being run at w + eps: what ``compute_loss`` counts, it counts where this is False."""
        return self._sam_step is not None and self._sam_step.second_pass

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what the Trainer logs, with ``sharpness`` beside the loss of training; and nothing in the second pass.

        Args:
            logs: the values.
            *args: for the Trainer.
            **kwargs: for the Trainer.
        """
        if self.second_pass:
            return
        if self._rises and {"loss", "learning_rate"} <= logs.keys():
            logs["sharpness"] = self.accelerator.gather(self._rise).mean().item() / self._rises
            self._rise, self._rises = 0.0, 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class SAMTrainer(SAMTrainerMixin, Trainer):  # type: ignore[misc]  # transformers is not there where types are checked
    """The Trainer with :class:`SAMTrainerMixin`."""
