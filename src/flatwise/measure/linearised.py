"""One part of the samples, linearised at the weights: what multiplies vectors by its curvature.

Hessian (Pearlmutter, 1994): ``H v = d(g . v)/dw``, one backward pass through the graph of the gradient g.
Gauss-Newton (Schraudolph, 2002): ``J^T H_L J v``, where J is the Jacobian of the model's outputs and ``H_L`` the
Hessian of the loss by them. ``J v`` is a backward pass through the graph of ``J^T u``, which is linear in u.

The graphs do not change from product to product. So they can be kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from flatwise.errors import UserError
from flatwise.measure.attention import twice_differentiable
from flatwise.measure.data import Part
from flatwise.measure.problem import BACKWARD, DOUBLE_BACKWARD, Problem

OUTER = (
    "the loss depends on the parameters not only through the model's outputs (a penalty on the weights?): "
    "the Gauss-Newton matrix leaves that part out"
)
LINEAR = "the loss is linear in the model's outputs: its Gauss-Newton matrix is zero"


class Linearised(Protocol):
    """What a part is, once its graphs are built.

    Attributes:
        loss: of the part, 0-dim.
        gradient: of that loss, for each parameter; empty where the form does not need it.
        used: which parameters the loss depends on.
        cost: of one product, in gradient evaluations.
    """

    loss: Tensor
    gradient: list[Tensor | None]
    used: set[int]
    cost: float

    def product(self, vector: Sequence[Tensor]) -> list[Tensor | None]:
        """Multiply a vector by the curvature of the part's mean loss.

        Args:
            vector: shaped as the parameters.

        Returns:
            The product, None for zeros.
        """


def pulled(
    outputs: Sequence[Tensor | None], inputs: Sequence[Tensor], vectors: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Multiply vectors by the transposed Jacobian of ``outputs`` by ``inputs``, and keep the graph.

    Args:
        outputs: what was computed; what is None or has no graph is constant.
        inputs: by what to differentiate.
        vectors: one for each output; None stands for zeros.

    Returns:
        One for each input, None for zeros.
    """
    pairs = [
        (out, v)
        for out, v in zip(outputs, vectors, strict=True)
        if out is not None and v is not None and out.requires_grad
    ]
    if not pairs:
        return [None] * len(inputs)
    outs, seeds = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outs, inputs, seeds, retain_graph=True, allow_unused=True))


class HessianPart:
    """The graph of the gradient.

    Args:
        problem: open.
        part: which samples.
    """

    cost = DOUBLE_BACKWARD

    def __init__(self, problem: Problem, part: Part) -> None:
        self._params = problem.params
        with torch.enable_grad():
            with twice_differentiable(problem.note):
                loss = problem.loss_of(part)
            self.gradient = problem.gradients_of(loss, create_graph=True)
        insist_on_second(self.gradient)
        problem.spend(part, BACKWARD)
        self.loss = loss.detach()
        self.used = {number for number, g in enumerate(self.gradient) if g is not None}

    def product(self, vector: Sequence[Tensor]) -> list[Tensor | None]:
        """Multiply a vector by the Hessian.

        Args:
            vector: shaped as the parameters.

        Returns:
            The product, None for zeros.
        """
        return pulled(self.gradient, self._params, vector)


class GaussNewtonPart:
    """The graphs of the outputs, of ``J^T u``, and of the loss's gradient by the outputs.

    Args:
        problem: open.
        part: which samples.
        jacobian: False leaves out the graph of ``J^T u``; ``J v`` has to come from elsewhere then.
    """

    cost = 2 * BACKWARD  # through the graph of J^T u by u alone, and through that of the outputs
    gradient: list[Tensor | None]

    def __init__(self, problem: Problem, part: Part, *, jacobian: bool = True) -> None:
        self._params = problem.params
        with torch.enable_grad():
            with split(problem) as halves, twice_differentiable(problem.note):
                loss = problem.loss_of(part)
            halves.check(loss, problem)
            self.loss, self.gradient = loss.detach(), []
            self._outputs, self._leaves = halves.outputs, halves.leaves
            self._pull = list(torch.autograd.grad(loss, self._leaves, create_graph=True, allow_unused=True))
            if not any(g is not None and g.requires_grad for g in self._pull):
                problem.note(LINEAR)
            self._u = [torch.zeros_like(z, requires_grad=True) for z in self._outputs]
            first = torch.autograd.grad(
                self._outputs, self._params, self._u, create_graph=jacobian, retain_graph=True, allow_unused=True
            )
        self._pulled = list(first) if jacobian else []
        insist_on_second(self._pulled)
        self.used = {number for number, g in enumerate(first) if g is not None}
        problem.spend(part, BACKWARD)

    def product(self, vector: Sequence[Tensor]) -> list[Tensor | None]:
        """Multiply a vector by the Gauss-Newton matrix.

        Args:
            vector: shaped as the parameters.

        Returns:
            The product, None for zeros.
        """
        return self.back(pulled(self._pulled, self._u, vector))

    def back(self, pushed: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Multiply what ``J v`` is by the Hessian of the loss and by the transposed Jacobian.

        Args:
            pushed: ``J v``, for each output tensor.

        Returns:
            ``J^T H_L J v``, None for zeros.
        """
        return pulled(self._outputs, self._params, pulled(self._pull, self._leaves, pushed))


class split:  # noqa: N801 - used as `with split(problem) as halves`
    """Cut the graph at the outputs of the model: the loss sees leaves with their values.

    Args:
        problem: whose model.
    """

    def __init__(self, problem: Problem) -> None:
        self._model = problem.model
        self.outputs: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self._calls = 0

    def __enter__(self) -> split:
        """Begin to cut."""
        self._handle = self._model.register_forward_hook(self._cut)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """Cut no more.

        Args:
            kind: of what was raised inside.
            error: what was raised inside.

        Raises:
            UserError: where the loss wants a derivative through the model.
        """
        self._handle.remove()
        if isinstance(error, RuntimeError) and "appears to not have been used in the graph" in str(error):
            raise UserError(
                "the loss differentiates the model's outputs by its inputs, so it is no function of the outputs alone: "
                "use matrix='hessian'"
            ) from error

    def _cut(self, module: Any, args: Any, output: Any) -> Any:
        self._calls += 1

        def leaf(value: Any) -> Any:
            if not (isinstance(value, Tensor) and value.requires_grad):
                return value
            self.outputs.append(value)
            self.leaves.append(value.detach().requires_grad_())
            return self.leaves[-1]

        return tree_map(leaf, output)

    def check(self, loss: Tensor, problem: Problem) -> None:
        """See that the loss is a function of the outputs, and note what is not.

        Args:
            loss: what was computed inside.
            problem: takes the note.

        Raises:
            UserError: where it is not, or the model is fed what it put out.
        """
        if not self.outputs:
            raise UserError(
                "the Gauss-Newton matrix needs the model's outputs, but loss_fn never called model(...), or it "
                "returned no tensor that depends on the parameters: use matrix='hessian'"
            )
        leaves = {id(leaf) for leaf in self.leaves}
        if self._calls > 1 and any(leaves & _reached(z) for z in self.outputs):
            raise UserError(
                "loss_fn feeds the model what the model put out, so its outputs are not one function of the "
                "parameters: use matrix='hessian'"
            )
        if not loss.requires_grad:
            raise UserError("the loss depends on none of the parameters: is it computed under no_grad, or detached?")
        if _reached(loss) & {id(p) for p in problem.params}:
            problem.note(OUTER)


def insist_on_second(outputs: Sequence[Tensor | None]) -> None:
    """See that what was differentiated once can be differentiated again.

    A function marked ``once_differentiable`` leaves its error where no path to the parameters leads, so autograd would
    silently leave out what should go through it.

    Args:
        outputs: gradients with graphs.

    Raises:
        RuntimeError: if there is such a function.
    """
    nodes = set().union(*(_nodes(out) for out in outputs if out is not None))
    if any(node.name().endswith("::Error") for node in nodes):
        raise RuntimeError("a function marked once_differentiable cannot be differentiated twice")


def _reached(tensor: Tensor) -> set[int]:
    """Find the leaves in the graph of a tensor, by the id of the tensor."""
    return {id(node.variable) for node in _nodes(tensor) if hasattr(node, "variable")}


def _nodes(tensor: Tensor) -> set[Any]:
    """Find all nodes of the graph of a tensor."""
    seen: set[Any] = set()
    waiting: list[Any] = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
    return seen


@contextmanager
def outputs_of(problem: Problem) -> Iterator[list[Tensor]]:
    """Collect the output tensors of the model, in the order of its calls.

    Args:
        problem: whose model.

    Yields:
        The list that they are put into.
    """
    collected: list[Tensor] = []

    def note(module: Any, args: Any, output: Any) -> None:
        collected.extend(
            leaf.detach() for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad
        )

    handle = problem.model.register_forward_hook(note)
    try:
        yield collected
    finally:
        handle.remove()
