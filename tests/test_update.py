"""One update: micro-batches, the optimizer's arithmetic, and the schedules that a run follows."""

import pytest
import torch
from runs import metrics, short
from test_method import RAMP, make, make_batch

from mcic.optim import build_optimizer
from mcic.trainer import Trainer
from mcic.update import Update


def test_micro_batches_are_averaged():
    model, objective = make(context="none")
    model.eval()
    batch = make_batch(((1, 0, 0), (1, 1, 0), (0, 0, 1), (0, 1, 1)))
    fields = [getattr(batch, name) for name in batch.__slots__]
    halves = (slice(0, 2), slice(2, 4))
    parts = [type(batch)(*(field if field is None else field[half] for field in fields)) for half in halves]
    alone = []
    for part in parts:
        model.zero_grad()
        output = objective(model, part, RAMP)
        output.total.backward()
        alone.append((output.terms, [parameter.grad.clone() for parameter in model.parameters()]))
    optimizer = build_optimizer(model, lr=0.0, new_layer_lr=1.0, momentum=0.0, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    figures = Update(model, objective, optimizer, scaler, accumulate=2)(batch, RAMP)
    (terms, gradients), (other_terms, other_gradients) = alone
    for name, term in terms.items():
        torch.testing.assert_close(figures[name], (term + other_terms[name]) / 2)
    for parameter, first, second in zip(model.parameters(), gradients, other_gradients, strict=True):
        torch.testing.assert_close(parameter.grad, (first + second) / 2)


def test_sgd_by_hand():
    model, _ = make(context="none")
    model.trained = ("network.backbone",)
    optimizer = build_optimizer(model, lr=0.1, new_layer_lr=10, momentum=0.9, weight_decay=0.01)
    for part, rate in (("network.backbone", 0.1), ("classification_head", 1.0)):
        parameter = next(each for name, each in model.named_parameters() if name.startswith(part))
        value, velocity = parameter.detach().clone(), 0
        for gradient in torch.randn(2, *parameter.shape):
            optimizer.zero_grad()
            parameter.grad = gradient.clone()
            velocity = 0.9 * velocity + gradient + 0.01 * value
            value = value - rate * velocity
            optimizer.step()
        torch.testing.assert_close(parameter.detach(), value)


@pytest.mark.parametrize("rules", ["paper", "authors"])
def test_a_run_follows_the_schedules_of_its_rules(tmp_path, rules):
    config = short(
        tmp_path / "run", train={"epochs": 3, "size": 33, "lr": 0.01}, data={"saliency": "none"},
        method={"rules": rules, "ramp_epochs": 2.0, "context": "none"}, eval={"mask_images": 0},
    )  # fmt: skip
    Trainer(config).fit()
    lines = metrics(tmp_path / "run")
    assert len(lines) == 12
    for step, line in enumerate(lines):
        x, done = min(step / 8, 1), step / 12 if rules == "paper" else (step // 4) / 3
        assert line["lambda"] == pytest.approx((3 * x**2 - 2 * x**3) ** (1 if rules == "paper" else 2))
        assert line["lr"] == pytest.approx(0.01 * (1 - done) ** 0.9)


def test_the_optimizer_steps_at_the_scheduled_rate(tmp_path):
    config = short(
        tmp_path / "run", train={"epochs": 2, "size": 33, "lr_schedule": "epoch", "lr": 0.01},
        method={"context": "none"}, data={"saliency": "none"}, eval={"mask_images": 0},
    )  # fmt: skip
    trainer, rates = Trainer(config), []
    step = trainer.update
    trainer.update = lambda *given: rates.append(trainer.optimizer.param_groups[0]["lr"]) or step(*given)
    trainer.fit()
    assert rates == pytest.approx([0.01] * 4 + [0.01 * 0.5**0.9] * 4)
