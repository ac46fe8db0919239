"""SAM in the last fifth of training only: the first four fifths cost what the base optimizer costs.

python examples/window.py
"""

import copy
import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from flatwise import SAM

torch.set_num_threads(1)
torch.manual_seed(0)

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).div(16).flatten(1)
labels = torch.tensor(digits.target)
start = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
epochs, steps_an_epoch = 10, 20

for window in ((0.0, 1.0), (0.8, 1.0)):
    model = copy.deepcopy(start)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    opt = SAM(base, rho=0.05, window=window, total_steps=epochs * steps_an_epoch)

    def loss_fn(batch, model=model):
        inputs, targets = batch
        return F.cross_entropy(model(inputs), targets)

    generator = torch.Generator().manual_seed(1)
    active = passes = 0
    begin = time.perf_counter()
    for _ in range(epochs):
        for index in torch.randperm(1280, generator=generator).split(64):
            opt.step(loss_fn, (images[index], labels[index]))
            active += opt.last.active
            passes += opt.last.passes
    seconds = time.perf_counter() - begin

    with torch.no_grad():
        accuracy = (model(images[1280:]).argmax(1) == labels[1280:]).float().mean()
    print(
        f"window {window}   active in {active} of {epochs * steps_an_epoch} steps, {passes} passes,"
        f" {seconds:.2f} s   test accuracy {accuracy:.4f}"
    )
