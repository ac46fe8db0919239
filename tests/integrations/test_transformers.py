"""The Hugging Face Trainer: hand-written SAM, and with rho = 0 the plain Trainer, bit for bit."""

from __future__ import annotations

import copy
import functools
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks.start import Sums, on_ranks
from torch import Tensor, nn
from torch.nn import functional as F

import flatwise

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
adapter = pytest.importorskip("flatwise.integrations.transformers")
SAMTrainer, SAMTrainerMixin, Trainer = adapter.SAMTrainer, adapter.SAMTrainerMixin, transformers.Trainer

RHO, LR = 0.2, 0.05


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """What Accelerate shares between all of its objects is not shared between tests."""
    yield
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


class Net(nn.Module):
    """Batch statistics and dropout (which ranks have apart), and the loss as the Trainer wants it."""

    def __init__(self, *, apart: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        middle = [nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3)] if apart else [nn.Tanh()]
        self.layers = nn.Sequential(nn.Linear(6, 8, bias=False), *middle, nn.Linear(8, 3))
        self.calls, self.bad = 0, dict[int, float]()

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.calls += self.training
        return {"loss": F.cross_entropy(self.layers(input_ids), labels) * self.bad.get(self.calls, 1.0)}


def data(count: int = 20) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(count, 6, generator=generator), torch.randint(3, (count,), generator=generator)
    return [{"input_ids": a, "labels": b} for a, b in zip(x, y, strict=True)]


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def texts(*, causal: bool) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 30, (20, 8), generator=generator)
    return [{"input_ids": row, "labels": row if causal else row[0] % 3} for row in ids]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[dict[str, Tensor]]]]] = {
    "net": (Net, data),
    "bert": (bert, lambda: texts(causal=False)),
    "llama": (llama, lambda: texts(causal=True)),
}


class InOrder(SAMTrainerMixin, Trainer):  # type: ignore[misc, name-defined]
    """Batches in the order of the data, so that a loop by hand can follow."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def arguments(folder: Path, **options: Any) -> Any:
    usual = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": LR, "logging_steps": 1}
    usual |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "max_grad_norm": 0.0}
    usual |= {"dataloader_pin_memory": False, "lr_scheduler_type": "constant"}
    return transformers.TrainingArguments(output_dir=str(folder), **(usual | options))


def make(kind: Any, folder: Path, model: nn.Module | None = None, dataset: Any = None, **options: Any) -> Any:
    own = {k: options.pop(k) for k in ("sam", "optimizers", "optimizer_cls_and_kwargs", "callbacks") if k in options}
    dataset = data() if dataset is None else dataset
    return kind(
        model=Net() if model is None else model, args=arguments(folder, **options), train_dataset=dataset, **own
    )


def run(trainer: Any, resume: Any = None) -> Any:
    torch.manual_seed(3)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def state(trainer: Any) -> list[Tensor]:
    entries = trainer.optimizer.state_dict()["state"].values()
    moments = [v for entry in entries for v in entry.values() if isinstance(v, Tensor)]
    return [t.detach().clone() for t in (*trainer.model.state_dict().values(), *moments)]


def logged(trainer: Any, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[n] for n in names) for row in trainer.state.log_history if "loss" in row]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def last(trainer: Any) -> flatwise.StepRecord:
    record: flatwise.StepRecord = trainer._sam_step.last
    return record


# Hand-written SAM


def by_hand(model: nn.Module, rows: Any, masks: list[Tensor], *, parts: int, clip: float = 0.0) -> list[float]:
    """SAM with AdamW on windows of ``parts`` micro-batches of 4; random states of the first pass are given."""
    base, losses = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0), []
    model.train()
    batches = [{k: torch.stack([r[k] for r in rows[i : i + 4]]) for k in rows[0]} for i in range(0, len(rows), 4)]
    for _ in range(2):
        for start in range(0, len(batches), parts):
            window = batches[start : start + parts]
            states, masks = masks[: len(window)], masks[len(window) :]

            def one_pass(window: Any = window, states: Any = states) -> float:
                base.zero_grad()
                total = 0.0
                for state, batch in zip(states, window, strict=True):
                    torch.set_rng_state(state)
                    loss = model(**batch)["loss"] / len(window)
                    loss.backward()
                    total += loss.item()
                return total

            losses.append(one_pass())
            buffers = copy.deepcopy(list(model.buffers()))
            params = [p for p in model.parameters() if p.grad is not None]
            kept = [p.detach().clone() for p in params]
            norm = torch.cat([p.grad.flatten() for p in params]).norm()
            with torch.no_grad():
                for p in params:
                    p.add_(RHO * p.grad / norm)
            one_pass()
            with torch.no_grad():
                for p, w in zip(params, kept, strict=True):
                    p.copy_(w)
                for b, c in zip(model.buffers(), buffers, strict=True):
                    b.copy_(c)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            base.step()
    assert not masks
    return losses


def to_double(rows: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{k: v.double() if v.is_floating_point() else v for k, v in row.items()} for row in rows]


@pytest.mark.supports("HF Trainer", "equal to hand-written SAM")
@pytest.mark.supports("HF Trainer", "gradient accumulation")
@pytest.mark.supports("HF Trainer", "clipping of the last gradient")
@pytest.mark.parametrize("clip", [0.0, 0.05], ids=["", "clipped"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_sam_by_hand(name: str, parts: int, clip: float, tmp_path: Path) -> None:
    """5 batches in windows of 2: the last window of an epoch is a partial one."""
    model, rows = MODELS[name][0]().double(), to_double(MODELS[name][1]())
    hand, masks = copy.deepcopy(model), list[Tensor]()
    model.register_forward_pre_hook(lambda *_: masks.append(torch.get_rng_state()))
    trainer = make(
        InOrder, tmp_path, model, rows, sam=RHO, optim="adamw_torch", gradient_accumulation_steps=parts,
        max_grad_norm=clip,
    )  # fmt: skip
    if name == "bert":
        trainer.loss_is_scaled_for_ga = False  # it takes any keyword, and the Trainer then leaves its mean undivided
    run(trainer)
    first: list[Tensor] = []
    windows = [parts] * (5 // parts) + [1] * (5 % parts)
    for count in windows * 2:
        ours, again, masks = masks[:count], masks[count : 2 * count], masks[2 * count :]
        assert same(ours, again), "a mask of its own in the second pass"
        first += ours
    losses = by_hand(hand, rows, first, parts=parts, clip=clip)
    for ours, theirs in zip(model.state_dict().values(), hand.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    assert [row[0] for row in logged(trainer, "loss")] == pytest.approx(losses, rel=1e-6)
    assert trainer.state.global_step == len(losses)


# rho = 0 is the plain Trainer


@pytest.mark.supports("HF Trainer", "rho = 0 is the plain run, bit for bit")
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.1}, {"bf16": True}, {"lr_scheduler_type": "linear"}],
    ids=str,
)
@pytest.mark.parametrize("name", MODELS)
def test_a_radius_of_zero_is_the_plain_trainer(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    counted = {"include_num_input_tokens_seen": "all", **options}
    trainers = [make(kind, tmp_path, MODELS[name][0](), MODELS[name][1](), **counted, **own)
                for kind, own in ((Trainer, {}), (SAMTrainer, {"sam": 0.0}))]  # fmt: skip
    plain, ours = map(run, trainers)
    assert same(state(plain), state(ours))
    names = ("loss", "grad_norm", "learning_rate", "num_input_tokens_seen", "step", "epoch")
    assert logged(plain, *names) == logged(ours, *names)
    assert plain.state.global_step == ours.state.global_step
    assert plain.state.total_flos == ours.state.total_flos


def test_masks_after_a_step_are_those_of_plain_training(tmp_path: Path) -> None:
    ends = []
    for kind, own in ((Trainer, {}), (SAMTrainer, {"sam": RHO})):
        run(make(kind, tmp_path, **own))
        ends.append(torch.get_rng_state())
    assert torch.equal(*ends)


# Counted and logged once


@pytest.mark.supports("HF Trainer", "logged loss is the clean one, metrics count once")
@pytest.mark.supports("HF Trainer", "sharpness for loggers")
def test_loss_and_tokens_are_counted_once_and_sharpness_stands_beside_them(tmp_path: Path) -> None:
    trainer = make(
        SAMTrainer, tmp_path, sam=RHO, gradient_accumulation_steps=2, logging_steps=2, max_steps=4,
        include_num_input_tokens_seen="all",
    )  # fmt: skip
    seen: list[tuple[float, float]] = []

    class Watch(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.append((last(trainer).loss, last(trainer).sharpness))

    trainer.add_callback(Watch())
    run(trainer)
    assert len(seen) == 4
    assert all(gap > 0 for _, gap in seen)
    rows = logged(trainer, "loss", "sharpness")
    for row, pair in zip(rows, (seen[:2], seen[2:]), strict=True):
        assert row == pytest.approx([sum(column) / 2 for column in zip(*pair, strict=True)], rel=1e-5)
    # 5 batches of 24 numbers an epoch: 3 windows, and one of the next epoch
    assert trainer.state.num_input_tokens_seen == 7 * 24
    assert not any("sharpness" in row for row in trainer.state.log_history if "loss" not in row)


def test_nothing_is_read_from_the_device_between_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the core reads on a CPU is read in perturb(); the adapter reads when it logs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Reads.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    inside, perturb, training_step, restore = [0], flatwise.SAM.perturb, SAMTrainer.training_step, flatwise.SAM.restore

    def measured(self: Any, call: Any) -> Any:
        before = Reads.count
        result = call(self)
        inside[0] += Reads.count - before
        return result

    monkeypatch.setattr(flatwise.SAM, "perturb", lambda self: measured(self, perturb))
    monkeypatch.setattr(flatwise.SAM, "restore", lambda self: measured(self, restore))
    outside = []

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        before, inside[0] = Reads.count, 0
        with Reads():
            loss = training_step(self, *args, **kwargs)
        outside.append(Reads.count - before - inside[0])
        return loss

    monkeypatch.setattr(SAMTrainer, "training_step", step)
    trainer = run(make(SAMTrainer, tmp_path, sam=RHO, logging_steps=10))
    assert outside == [0] * 10
    assert Reads.count > 0, "nothing was counted at all"
    assert isinstance(logged(trainer, "sharpness")[0][0], float)


def test_what_compute_loss_logs_and_counts_is_that_of_the_first_pass(tmp_path: Path) -> None:
    class Counts(SAMTrainer):  # type: ignore[misc, valid-type]
        count = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.count += not self.second_pass
            self.log({"own": 1.0})
            return super().compute_loss(*args, **kwargs)

    trainer = run(make(Counts, tmp_path, sam=RHO))
    assert trainer.count == 10
    assert sum("own" in row for row in trainer.state.log_history) == 10
    assert trainer.model.calls == 20


# Ways to give an optimizer


def test_every_way_to_give_the_optimizer_is_the_same(tmp_path: Path) -> None:
    ends = []
    usual = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8}
    for number in range(5):
        model, own = Net(), {}
        named = list(model.named_parameters())
        weights = [p for n, p in named if n.endswith("weight")], [p for n, p in named if not n.endswith("weight")]
        groups = [{"params": params, "weight_decay": 0.0} for params in weights]  # as the Trainer makes them
        if number == 0:
            own = {"sam": RHO, "optim": "adamw_torch"}
        elif number == 1:
            own = {"sam": lambda base: flatwise.create("sam", base, rho=RHO), "optim": "adamw_torch"}
        elif number == 2:
            own = {
                "optimizer_cls_and_kwargs": (flatwise.SAM, {"base_optimizer": torch.optim.AdamW, "rho": RHO, **usual})
            }
        elif number == 3:
            own = {"optimizer_cls_and_kwargs": (torch.optim.AdamW, usual), "sam": RHO}
        else:
            own = {"optimizers": (flatwise.SAM(torch.optim.AdamW(groups, **usual), RHO), None)}
        trainer = run(make(SAMTrainer, tmp_path, model, **own))
        ends.append(state(trainer))
    assert all(same(ends[0], end) for end in ends[1:])


def test_the_default_radius_is_that_of_sam(tmp_path: Path) -> None:
    run(trainer := make(SAMTrainer, tmp_path, max_steps=1))
    assert last(trainer).rho == 0.05


def test_two_trainings_of_one_trainer_keep_one_optimizer(tmp_path: Path) -> None:
    trainer = run(make(SAMTrainer, tmp_path, sam=RHO, max_steps=2))
    inner = trainer._sam_step._sam
    run(trainer)
    assert trainer._sam_step._sam is inner
    assert last(trainer).step == 3
    assert len(inner._optimizer_step_pre_hooks) == 1


def test_only_biases_are_trained(tmp_path: Path) -> None:
    """The Trainer's first group, of what decays, is empty then."""
    model = Net()
    for name, param in model.named_parameters():
        param.requires_grad_(name.endswith("bias"))
    trainer = run(make(SAMTrainer, tmp_path, model, sam=RHO))
    assert trainer.optimizer.param_groups[0]["params"] == []
    assert last(trainer).active


# Adapters of parameters


@pytest.mark.supports("HF Trainer", "PEFT: adapters only")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_frozen_backbone_costs_no_copy(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query", "value"], r=2, task_type="SEQ_CLS"))
    trainer = make(SAMTrainer, tmp_path, model, texts(causal=False), sam=RHO, max_steps=2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    copied: list[int] = []
    step = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        if trainer.second_pass:
            copied.append(sum(now.numel() for now, _ in trainer._sam_step._sam._look._displacement.moved()))
        return step(*args, **kwargs)

    trainer.compute_loss = compute_loss
    run(trainer)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert copied == [sum(p.numel() for n, p in model.named_parameters() if n in trained)] * 2
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == trained


# Scaled losses


def scaled(trainer: Any) -> Any:
    """What the Trainer makes on a GPU for fp16=True."""
    accelerator = trainer.accelerator
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=1024.0), True
    accelerator.state._mixed_precision = "fp16"
    accelerator.autocast_handler = accelerate.utils.AutocastKwargs(enabled=False)  # scaling alone
    return trainer


@pytest.mark.supports("HF Trainer", "GradScaler")
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("clip", [0.0, 0.1], ids=["", "clipped"])
def test_a_scale_changes_nothing(parts: int, clip: float, tmp_path: Path) -> None:
    options = {"sam": RHO, "gradient_accumulation_steps": parts, "max_grad_norm": clip}
    plain = run(make(SAMTrainer, tmp_path, **options))
    ours = run(scaled(make(SAMTrainer, tmp_path, **options)))
    assert same(state(plain), state(ours))
    assert logged(plain, "loss", "grad_norm") == logged(ours, "loss", "grad_norm")
    assert ours.accelerator.scaler.get_scale() == 1024


@pytest.mark.supports("HF Trainer", "fp16 overflow in either pass")
@pytest.mark.parametrize("bad", [(5,), (6,), (5, 6)], ids=["first", "second", "both"])
@pytest.mark.parametrize("clip", [0.0, 0.1], ids=["", "clipped"])
def test_an_overflow_in_any_pass_is_no_step(bad: tuple[int, ...], clip: float, tmp_path: Path) -> None:
    model = Net()
    trainer = scaled(
        make(SAMTrainer, tmp_path, model, sam=RHO, max_steps=4, max_grad_norm=clip, lr_scheduler_type="linear")
    )
    model.bad = dict.fromkeys(bad, math.inf)
    ends: list[tuple[list[Tensor], float, float]] = []

    class Watch(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            rate = trainer.lr_scheduler.get_last_lr()[0]
            if 5 in bad and len(ends) == 2:
                model.calls += 1  # there was no second pass, or model.bad would mean the next step
            weights = [p.detach().clone() for p in model.parameters()]
            moments = [v.clone() for e in trainer.optimizer.state_dict()["state"].values() for v in e.values()]
            ends.append(([*weights, *moments], rate, trainer.accelerator.scaler.get_scale()))

    trainer.add_callback(Watch())
    run(trainer)
    assert [scale for *_, scale in ends] == [1024, 1024, 512, 512]
    assert same(ends[1][0], ends[2][0])
    assert not torch.equal(ends[2][0][0], ends[3][0][0])
    rates = [rate for _, rate, _ in ends]
    assert rates[0] > rates[1] == rates[2] > rates[3]
    assert trainer.state.global_step == 4


# Resuming


@pytest.mark.supports("HF Trainer", "resume, bit for bit")
@pytest.mark.parametrize("parts", [1, 2])
def test_resuming_is_bit_for_bit(parts: int, tmp_path: Path) -> None:
    options = {"sam": lambda base: flatwise.SAM(base, lambda step: RHO / (1 + step)), "save_strategy": "steps"}
    options |= {"save_steps": 2, "gradient_accumulation_steps": parts, "lr_scheduler_type": "linear"}
    whole = run(make(SAMTrainer, tmp_path / "a", **options))
    again = run(make(SAMTrainer, tmp_path / "b", **options), resume=str(tmp_path / "a" / "checkpoint-2"))
    assert again.state.global_step == whole.state.global_step > 4
    assert same(state(whole), state(again))
    assert logged(whole, "loss", "sharpness") == logged(again, "loss", "sharpness")


# Compiled


@pytest.mark.supports("HF Trainer", "no recompiles")
def test_a_compiled_model_is_compiled_no_more_often(tmp_path: Path) -> None:
    counts = []
    for kind, own in ((Trainer, {}), (SAMTrainer, {"sam": RHO})):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trainer = make(
            kind, tmp_path, bert(), texts(causal=False), torch_compile=True, torch_compile_backend="eager", **own
        )
        run(trainer)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert counts[0] == counts[1] > 0


# Mistakes


@pytest.mark.supports("HF Trainer", "misuse is refused by name")
def test_a_plain_trainer_is_told_of_the_mixin(tmp_path: Path) -> None:
    model = Net()
    opt = flatwise.SAM(torch.optim.SGD(model.parameters(), lr=0.1), RHO)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="SAMTrainerMixin"):
        run(make(Trainer, tmp_path, model, optimizers=(opt, None)))
    assert same(before, list(model.parameters()))


@pytest.mark.supports("HF Trainer", "an exception in either pass leaves w")
@pytest.mark.parametrize("bad", [3, 5, 6, 8])
def test_an_error_in_any_pass_leaves_the_weights_where_they_were(bad: int, tmp_path: Path) -> None:
    """Windows of 2: calls 1, 2 and again 3, 4; then 5, 6 and again 7, 8."""
    model = Net()
    ends: list[list[Tensor]] = [[p.detach().clone() for p in model.parameters()]]

    class Watch(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append([p.detach().clone() for p in model.parameters()])

    trainer = make(SAMTrainer, tmp_path, model, sam=RHO, gradient_accumulation_steps=2, callbacks=[Watch()])
    forward = model.forward

    @functools.wraps(forward)
    def fails(*args: Any, **kwargs: Any) -> Any:
        if model.calls == bad - 1:
            model.calls += 1
            raise KeyError("the data ended")
        return forward(*args, **kwargs)

    model.forward = fails  # type: ignore[method-assign]
    with pytest.raises(KeyError):
        run(trainer)
    assert same(ends[-1], list(model.parameters()))
    calls = model.calls
    run(trainer)
    assert last(trainer).active
    assert model.calls == calls + 20, "what was left of that window has reached the next training"


def test_labels_that_the_trainer_takes_out_are_there_in_the_second_pass(tmp_path: Path) -> None:
    trainer = make(SAMTrainer, tmp_path, bert(), texts(causal=False), sam=RHO, label_smoothing_factor=0.1, max_steps=2)
    seen: list[bool] = []
    smoother = trainer.label_smoother

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(trainer.second_pass)
        return smoother(*args, **kwargs)

    trainer.label_smoother = watched
    run(trainer)
    assert seen == [False, True] * 2


def test_a_missing_framework_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "flatwise.integrations.transformers")
    with pytest.raises(ImportError, match=r'pip install "flatwise\[huggingface\]"'):
        importlib.import_module("flatwise.integrations.transformers")


def test_sam_is_given_once(tmp_path: Path) -> None:
    model = Net()
    opt = flatwise.SAM(torch.optim.SGD(model.parameters(), lr=0.1), RHO)
    with pytest.raises(ValueError, match="leave one of them out"):
        make(SAMTrainer, tmp_path, model, optimizers=(opt, None), sam=RHO)
    both = (flatwise.SAM, {"base_optimizer": torch.optim.SGD, "lr": 0.1})
    with pytest.raises(ValueError, match="leave one of them out"):
        run(make(SAMTrainer, tmp_path, optimizer_cls_and_kwargs=both, sam=RHO))


def test_an_optimizer_that_steps_inside_of_backward_is_refused(tmp_path: Path) -> None:
    class Lomo(torch.optim.SGD):
        pass

    trainer = make(SAMTrainer, tmp_path, optimizer_cls_and_kwargs=(Lomo, {"lr": 0.1}), optim="lomo")
    with pytest.raises(ValueError, match="'lomo' moves weights inside of backward"):
        run(trainer)


@pytest.mark.supports("HF Trainer", "DeepSpeed is refused")
def test_deepspeed_is_refused_at_once(tmp_path: Path) -> None:
    class Engine(SAMTrainer):  # type: ignore[misc, valid-type]
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.accelerator.state.distributed_type = "DEEPSPEED"

    with pytest.raises(ValueError, match=r"DEEPSPEED.*FSDP2 .*or DDP"):
        make(Engine, tmp_path)


# Two processes


def train_on_rank(rank: int, parts: int, rho: float | None, apart: bool, folder: str, world: int = 2) -> dict[str, Any]:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": 1}
    os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="localhost")
    sums: list[Sums] = []
    counts: list[int] = []

    class Watch(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            if world > 1:
                sums.append(Sums(trainer.model_wrapped))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            counts.append(sum(each.count for each in sums))
            for each in sums:
                each.count = 0

    kind, own = (Plain, {}) if rho is None else (InOrder, {"sam": rho})
    trainer = make(
        kind, Path(folder), Net(apart=apart).double(), to_double(data(20)), **own, callbacks=[Watch()],
        per_device_train_batch_size=4 // world, gradient_accumulation_steps=parts, optim="adamw_torch",
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    run(trainer)
    names = ("loss", "grad_norm") if not rho else ("loss", "grad_norm", "sharpness")
    return {"state": state(trainer), "counts": counts, "log": logged(trainer, *names)}


class Plain(Trainer):  # type: ignore[misc, name-defined]
    _get_train_sampler = InOrder._get_train_sampler


@pytest.mark.supports("HF Trainer", "two processes")
@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_two_processes_are_one_with_the_whole_batch(parts: int, tmp_path: Path) -> None:
    first, second = on_ranks(train_on_rank, tmp_path, parts, RHO, False, str(tmp_path / "out"))
    model = Net(apart=False).double()
    one = run(make(InOrder, tmp_path, model, to_double(data()), sam=RHO, gradient_accumulation_steps=parts,
                   optim="adamw_torch"))  # fmt: skip
    assert same(first["state"], second["state"])
    for ours, theirs in zip(first["state"], state(one), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    for ours, theirs in zip(first["log"], logged(one, "loss", "grad_norm", "sharpness"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert first["log"] == second["log"]
    steps = 2 * -(-5 // parts)
    assert first["counts"] == [2] * steps, "one sum of gradients for each pass"


@pytest.mark.slow
def test_a_radius_of_zero_is_the_plain_trainer_on_two_ranks(tmp_path: Path) -> None:
    """Each rank has batch statistics and masks of its own."""
    ends = []
    for number, rho in enumerate((None, 0.0)):
        folder = tmp_path / str(number)
        folder.mkdir()
        ends.append(on_ranks(train_on_rank, folder, 2, rho, True, str(folder / "out")))
    for plain, ours in zip(*ends, strict=True):
        assert same(plain["state"], ours["state"])
        assert plain["log"] == ours["log"]
        assert plain["counts"] == ours["counts"]
