"""m-sharpness: each m samples of a batch get a perturbation of their own.

    python examples/m_sharpness.py

The whole batch of 64 is m = 64. A smaller m passes over the same samples in smaller pieces, and each piece climbs
on its own samples, so the sharpness grows.
"""

import copy

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

for m in (64, 16, 4):
    model = copy.deepcopy(start)
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.1, micro_batch_size=m)

    def loss_fn(batch, model=model):
        inputs, targets = batch
        return F.cross_entropy(model(inputs), targets)

    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        sharpness = []
        for index in torch.randperm(1280, generator=generator).split(64):
            opt.step(loss_fn, (images[index], labels[index]))
            sharpness.append(opt.last.sharpness)

    with torch.no_grad():
        accuracy = (model(images[1280:]).argmax(1) == labels[1280:]).float().mean()
    mean = sum(sharpness) / len(sharpness)
    print(f"m = {m:2}   test accuracy {accuracy:.4f}   mean sharpness of the last epoch {mean:.4f}")
