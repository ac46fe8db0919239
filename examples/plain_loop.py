"""One training loop, written with each of the four forms of call: the weights agree to the bit.

python examples/plain_loop.py
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from flatwise import SAM

torch.set_num_threads(1)  # one order of summation
torch.manual_seed(0)

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).div(16).flatten(1)
labels = torch.tensor(digits.target)
train, test = slice(0, 1280), slice(1280, None)
start = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))


def batches():
    """The same batches in the same order, for each form of call."""
    order = torch.randperm(1280, generator=torch.Generator().manual_seed(1))
    return [(images[train][index], labels[train][index]) for index in order.split(64)]


def with_loss_function(model, opt):
    def loss_fn(batch):
        inputs, targets = batch
        return F.cross_entropy(model(inputs), targets)

    for batch in batches():
        opt.step(loss_fn, batch)


def with_closure(model, opt):
    for inputs, targets in batches():

        def closure():
            opt.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)  # noqa: B023  the closure runs inside its own turn
            loss.backward()
            return loss

        opt.step(closure)


def with_two_steps(model, opt):
    for inputs, targets in batches():
        F.cross_entropy(model(inputs), targets).backward()
        opt.first_step(zero_grad=True)
        F.cross_entropy(model(inputs), targets).backward()
        opt.second_step(zero_grad=True)


def with_context(model, opt):
    for inputs, targets in batches():
        opt.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        with opt.perturbed():
            opt.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
        opt.base_optimizer.step()


def trained(epoch):
    """Five epochs of the same training; returns the final weights and buffers."""
    torch.manual_seed(2)  # dropout
    model = copy.deepcopy(start).train()
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05, model=model)
    for _ in range(5):
        epoch(model, opt)
    model.eval()
    accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean()
    print(f"{epoch.__name__:20} test accuracy {accuracy:.4f}   {opt.last.passes} passes a step")
    return model.state_dict()


forms = [with_loss_function, with_closure, with_two_steps, with_context]
first, *others = [trained(form) for form in forms]
for other in others:
    assert all(torch.equal(first[name], other[name]) for name in first)
print("All four end in the same weights and the same batch-norm statistics, bit for bit.")
