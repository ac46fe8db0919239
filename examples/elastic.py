"""Two processes under torchrun: a worker that dies costs a few steps of time, and not a bit of the result.

python examples/elastic.py                 starts torchrun by itself, in a folder that goes away

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/elastic.py FOLDER

Without the first line torchrun keeps one store over all restarts, in which workers may find the addresses of those that
died: they wait in vain, or the restart fails (pytorch/pytorch issue 135712; seen here with torch 2.14).

Everything that the next step depends on is saved at once: model, optimizer, position in the data, and the random state
of every rank. The optimizer's state holds the radii and the step count of SAM, and no copies of weights: a worker that
dies at w + eps leaves nothing behind, because what is saved is always saved at w.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DistributedSampler, TensorDataset

from flatwise import SAM

EPOCHS, SIZE, EVERY = 4, 8, 5

generator = torch.Generator().manual_seed(0)
data = TensorDataset(torch.randn(160, 20, generator=generator), torch.randint(4, (160,), generator=generator))


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 4))
    ddp = DistributedDataParallel(model)
    return ddp, SAM(torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9), rho=0.05, model=ddp)


def loss_of(model, batch):
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets)


def save(path, ddp, opt, epoch, position):
    random = [None] * distributed.get_world_size()
    distributed.all_gather_object(random, torch.get_rng_state())
    if distributed.get_rank() == 0:
        state = {"model": ddp.module.state_dict(), "optimizer": opt.state_dict()}
        torch.save({**state, "epoch": epoch, "position": position, "random": random}, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)  # a file is whole, or not there


def load(path, ddp, opt):
    saved = torch.load(path)
    ddp.module.load_state_dict(saved["model"])
    opt.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["random"][distributed.get_rank()])
    return saved["epoch"], saved["position"]


def train(folder):
    distributed.init_process_group("gloo")
    rank, path = distributed.get_rank(), folder / "state.pt"
    ddp, opt = make()
    torch.manual_seed(1 + rank)  # each rank its own masks
    epoch, position = load(path, ddp, opt) if path.exists() else (0, 0)
    sampler = DistributedSampler(data, shuffle=True, seed=0)
    for now in range(epoch, EPOCHS):
        sampler.set_epoch(now)
        indices = list(BatchSampler(sampler, SIZE, drop_last=True))
        for number, index in enumerate(indices[position:], start=position + 1):
            opt.step(lambda batch: loss_of(ddp, batch), data[index])
            if number % EVERY == 0:
                save(path, ddp, opt, now, number)
        position = 0
    if rank == 0:
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        print(f"{opt.last.step + 1} steps, {restarts} restarts, loss {opt.last.loss:.4f}")
        torch.save({"model": ddp.module.state_dict(), "optimizer": opt.state_dict()}, folder / "final.pt")
    distributed.destroy_process_group()


def start(script, folder, restarts=3):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", str(restarts), str(script), str(folder)]
    env = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=400)


if __name__ == "__main__":
    if "RANK" in os.environ:
        train(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            print(start(Path(__file__).resolve(), folder).stdout, end="")
