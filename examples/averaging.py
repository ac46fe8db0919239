"""Averages of the weights beside a sharpness-aware method: EMA and SWA by torch's own AveragedModel.

python examples/averaging.py

Outside a step the weights are w, also with methods that are displaced between steps in their papers, so an average
needs no special call. The batch statistics belong to the last weights; update_bn computes those of the average.
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import flatwise

torch.set_num_threads(1)
torch.manual_seed(0)

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).div(16).flatten(1)
labels = torch.tensor(digits.target)
train, test = (images[:1280], labels[:1280].clone()), (images[1280:], labels[1280:])
wrong = torch.randperm(1280)[:512]  # 40 % of the training labels are drawn anew
train[1][wrong] = torch.randint(10, (512,))
start = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))
epochs, swa_from = 20, 15


def accuracy(model):
    model.eval()
    with torch.no_grad():
        return (model(test[0]).argmax(1) == test[1]).float().mean().item()


def run(name, **options):
    """Train with one method; return the test accuracy of the last weights, their EMA and their SWA."""
    model = copy.deepcopy(start)
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if name != "sgd":
        opt = flatwise.create(name, opt, **options)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98))  # about the last 50 steps
    swa = AveragedModel(model)

    def loss_fn(batch):
        inputs, targets = batch
        return F.cross_entropy(model(inputs), targets)

    generator = torch.Generator().manual_seed(1)
    for epoch in range(epochs):
        model.train()
        for index in torch.randperm(1280, generator=generator).split(64):
            batch = train[0][index], train[1][index]
            if name == "sgd":
                opt.zero_grad()
                loss_fn(batch).backward()
                opt.step()
            else:
                opt.step(loss_fn, batch)
            ema.update_parameters(model)
        if epoch >= swa_from:
            swa.update_parameters(model)

    batches = [train[0][index] for index in torch.arange(1280).split(64)]
    for average in (ema, swa):
        update_bn(batches, average)
    return accuracy(model), accuracy(ema), accuracy(swa)


print("test accuracy       last weights    EMA    SWA")
for name, options in {"sgd": {}, "sam": {"rho": 0.3}, "msam": {"rho": 1.0}}.items():
    print(f"{name:20}{'{:12.3f}{:7.3f}{:7.3f}'.format(*run(name, **options))}")
print("One seed of one small task: it shows how the parts go together, not which is better.")
