"""Every method of the family on one small task: what a step costs, and what it ends with.

python examples/family.py

The radii are the defaults, which belong to other networks and data; methods are not comparable at them.
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import flatwise

torch.set_num_threads(1)
torch.manual_seed(0)

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).div(16).flatten(1)
labels = torch.tensor(digits.target)
start = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
epochs, steps_an_epoch = 3, 20

# What a method cannot know by itself.
NEEDED = {
    "p": float("inf"),
    "total_steps": epochs * steps_an_epoch,
    "warmup_steps": steps_an_epoch,
    "micro_batch_size": 16,
    "train_size": 1280,
}
RADIUS = {"lp": 0.002}  # p = inf moves every weight by rho


def run(name):
    """Train with one method; return gradients per step, calls of the loss function per step, test accuracy."""
    row = flatwise.variant_info(name)
    model = copy.deepcopy(start)
    options = {option: model if option == "model" else NEEDED[option] for option in row.needs}
    if name in RADIUS:
        options["rho"] = RADIUS[name]
    opt = flatwise.create(name, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), **options)
    ranks = name in ("k-sam", "esam-sds")  # these choose samples by their loss

    def loss_fn(batch):
        inputs, targets = batch
        return F.cross_entropy(model(inputs), targets, reduction="none" if ranks else "mean")

    generator = torch.Generator().manual_seed(1)
    passes = calls = 0
    for _ in range(epochs):
        for index in torch.randperm(1280, generator=generator).split(64):
            opt.step(loss_fn, (images[index], labels[index]))
            passes += opt.last.passes
            calls += opt.last.closure_calls
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[1280:]).argmax(1) == labels[1280:]).float().mean().item()
    steps = epochs * steps_an_epoch
    return passes / steps, calls / steps, accuracy


print(f"{'method':16}{'gradients':>10}{'calls':>7}{'accuracy':>10}   what it changes")
for name in flatwise.list_variants():
    passes, calls, accuracy = run(name)
    print(f"{name:16}{passes:10.2f}{calls:7.2f}{accuracy:10.3f}   {flatwise.variant_info(name).summary}")
