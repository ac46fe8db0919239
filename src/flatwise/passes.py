"""Running the user's closure, and naming what went wrong in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

Closure = Callable[[], Any]

LOOPS = """
    opt.step(closure)            # closure: opt.zero_grad(), forward, loss.backward(), return loss; runs twice
    opt.step(loss_fn, batch)     # loss_fn(batch) returns the mean loss; flatwise does the rest
    loss.backward(); opt.first_step(zero_grad=True); loss_again.backward(); opt.second_step(zero_grad=True)"""

NO_CLOSURE = f"""SAM needs two gradients per step, so opt.step() cannot work alone. Write one of:{LOOPS}
In a framework that calls step() by itself, use its adapter in flatwise.integrations (for the Lightning Trainer
SAMCallback, for the Hugging Face Trainer SAMTrainerMixin, for Accelerate SAMStep), or call opt.perturb() and
opt.restore() around a second pass first."""

NO_GRADIENTS = """the closure left no gradients: call loss.backward() in it, before `return loss`. (After fully_shard, \
the parameters of the model are others: make the optimizer after it.)"""

NO_CALLBACK = """the Lightning Trainer ran one pass, and SAM needs two gradients per step. Give it flatwise's callback:
    from flatwise.integrations.lightning import SAMCallback
    Trainer(callbacks=[SAMCallback()])
With automatic_optimization = False, step with opt.step(closure) instead."""

STALE = """the closure did not clear the gradients left over from an earlier backward pass, so SAM would climb along \
the sum of two batches. Clear them in the closure:
    def closure():
        opt.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss
If you meant to accumulate several batches, put all of them into one closure, or give opt.step(loss_fn, batch) the \
whole batch with micro_batch_size=m."""

SECOND_TIME = """the second pass of the sharpness-aware step uses a tensor that was computed before the weights were \
perturbed (a model output, a feature, a loss that is summed up, a weight of the samples). Compute it inside the \
closure, which runs twice, or detach() it if it does not depend on the weights. retain_graph=True does not help: the \
kept graph belongs to other weights. The original error was:
    """

TOO_FEW = """micro_batch_size or a fraction of the batch leaves one sample alone, which has no batch statistics: \
choose them so that no part has one sample, and give the loader drop_last=True. The original error was:
    """

NOT_IN_THE_LOSS = """the loss depends on none of the parameters that would move (with only="norm" the weights of \
normalisation layers): freeze what is not used, or perturb all parameters. The original error was:
    """


def checked_loss(loss: Any) -> Tensor | float:
    """Return the loss of a closure, or say what is wrong with it.

    Args:
        loss: what the closure returned.

    Returns:
        A number, or a detached tensor with one element.

    Raises:
        TypeError: if it is None or not a number.
        ValueError: if it has more than one element.
    """
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise ValueError(
                f"the closure must return one number, but its loss has shape {tuple(loss.shape)}: "
                "reduce it, for example with loss.mean(), before loss.backward()"
            )
        return loss.detach()
    if isinstance(loss, int | float) and not isinstance(loss, bool):
        return float(loss)
    if loss is None:
        raise TypeError("the closure returned None: end it with `return loss`")
    raise TypeError(
        f"the closure must return the loss as one number, got {type(loss).__name__}: "
        "if it has several parts, return their sum"
    )


def first_pass(closure: Closure) -> Tensor | float:
    """Run the closure at w.

    Args:
        closure: zero_grad, forward, backward, return loss.

    Returns:
        The loss.

    Raises:
        RuntimeError: if the closure fails; a vector loss is named.
    """
    try:
        with torch.enable_grad():
            return checked_loss(closure())
    except RuntimeError as error:
        if "grad can be implicitly created only for scalar outputs" in str(error):
            raise RuntimeError(
                "loss.backward() was called on a loss with several elements: "
                "reduce it first, for example with loss.mean()"
            ) from error
        raise


def later_pass(closure: Closure) -> Tensor | float:
    """Run the closure again, at w + eps.

    Args:
        closure: the same closure.

    Returns:
        The loss there.

    Raises:
        RuntimeError: if the closure fails; a graph kept from the first pass is named.
    """
    try:
        with torch.enable_grad():
            return checked_loss(closure())
    except RuntimeError as error:
        text = str(error)
        if "backward through the graph a second time" in text or "modified by an inplace operation" in text:
            raise RuntimeError(SECOND_TIME + text) from error
        raise


def of_lightning(closure: Any) -> bool:
    """Tell the closure in which a Lightning Trainer runs everything up to the update: it must not run twice.

    Args:
        closure: what ``step`` was called with.

    Returns:
        Whether it is one; the closure that a user gave to Lightning is none.
    """
    while isinstance(closure, partial) and closure.args:  # each precision plugin wraps it, the closure comes last
        closure = closure.args[-1]
    return str(getattr(closure, "__module__", "")).startswith(("lightning.pytorch.", "pytorch_lightning."))


def sample_losses(loss: Any, count: int) -> Tensor:
    """Return the losses of the samples, or say what is wrong with them.

    Args:
        loss: what the loss function returned.
        count: number of samples.

    Returns:
        Shape (count,).

    Raises:
        ValueError: if it is not one loss for each sample.
    """
    if not isinstance(loss, Tensor) or loss.shape != (count,):
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            "top_fraction and rising_fraction choose samples by their loss, so loss_fn(batch) must return one loss "
            f"for each of the {count} samples, shape ({count},), got {found}: for example "
            "F.cross_entropy(model(x), y, reduction='none')"
        )
    return loss


def from_loss_fn(
    loss_fn: Callable[[Any], Any],
    part: Any,
    clear: Callable[[], None],
    samples: int | None = None,
    seen: Callable[[Tensor], None] | None = None,
    scaled: Callable[[Tensor], Tensor] | None = None,
) -> Closure:
    """Make a closure of a loss function and a batch.

    Args:
        loss_fn: ``loss_fn(batch)`` returns the mean loss.
        part: the batch, or a part of it.
        clear: clears all gradients.
        samples: number of samples in the part, where the function returns a loss for each.
        seen: is given these losses, detached.
        scaled: turns the loss into what is differentiated.

    Returns:
        The closure.
    """

    def closure() -> Any:
        clear()
        loss = loss_fn(part)
        if samples is not None:
            loss = sample_losses(loss, samples)
            if seen is not None:
                seen(loss.detach())
            loss = loss.mean()
        checked_loss(loss)
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss_fn must return a tensor, got {type(loss).__name__}")
        (loss if scaled is None else scaled(loss)).backward()  # type: ignore[no-untyped-call]
        return loss

    return closure


@contextmanager
def removed(register: Callable[[], Any]) -> Iterator[None]:
    """Have a hook inside the block only: one that an interrupt left behind would be there for good.

    Args:
        register: registers the hook and returns its handle.

    Yields:
        Nothing.
    """
    handle = None
    try:
        try:
            handle = register()
            yield
        finally:
            if handle is not None:
                handle.remove()
    finally:  # an interrupt can come between the lines of the one above
        if handle is not None:
            handle.remove()


@contextmanager
def refuse_stale_gradients(groups: list[dict[str, Any]]) -> Iterator[None]:
    """Raise if gradients that exist on entry are still there, added to or not, on leaving.

    One gradient of each group is watched: it is stale if it is the same tensor, was changed only by accumulation
    (clearing it in place changes it once more), and is not just what was accumulated.

    Args:
        groups: the parameter groups.

    Yields:
        Nothing.

    Raises:
        RuntimeError: if gradients were not cleared.
    """
    probes = []
    with ExitStack() as hooks:
        for group in groups:
            usable = (p for p in group["params"] if p.grad is not None and p.requires_grad and not p.grad.is_sparse)
            param = min(usable, key=Tensor.numel, default=None)  # the smallest: what is watched is also held
            if param is not None:
                arrived: list[Tensor] = []
                hooks.enter_context(removed(partial(param.register_hook, arrived.append)))
                probes.append((param, param.grad, param.grad._version, arrived))
        yield
    for param, grad, version, arrived in probes:
        untouched = param.grad is grad and grad._version - version <= len(arrived)
        if untouched and not (arrived and torch.equal(grad, sum(arrived[1:], arrived[0]))):
            raise RuntimeError(STALE)
