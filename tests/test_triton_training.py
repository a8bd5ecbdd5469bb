"""Training with the fused kernels and with the references, step by step from equal parameters."""

import torch
from conftest import relative_error
from runs import short

from mcic.trainer import Trainer

STEPS = 100


def test_a_hundred_steps_agree(tmp_path, device):
    """A mask's pixel may flip where its two best scores are within rounding, so steps with a flip are left out."""
    trainers = {}
    for backend in ("triton", "reference"):
        config = short(
            tmp_path / backend,
            data={"train_images": 16},
            method={"slots": 4, "attention_threshold": 1.0, "entropy_weight": 0.3, "pool_threshold": 0.3},
            train={"size": 17, "batch_size": 2, "epochs": 13, "warmup_steps": 10},
            run={"backend": backend, "device": device.type},
        )
        trainers[backend] = Trainer(config)
        trainers[backend].model.train()
    fused, reference = trainers.values()
    masks = {name: recorded(trainer) for name, trainer in trainers.items()}
    compared = 0
    for step in range(STEPS):
        epoch, place = divmod(step, fused.loader.steps)
        if place == 0:
            batches = fused.loader.epoch(epoch)
        batch = next(batches).to(device)
        reference.model.load_state_dict(fused.model.state_dict())
        fused.step = reference.step = step
        figures = [trainer._train_step(batch) for trainer in (fused, reference)]
        assert figures[0].keys() == figures[1].keys()
        ours, theirs = (made.pop() for made in masks.values())
        flipped = sum((a != b).sum().item() for a, b in zip(ours, theirs, strict=True))
        assert flipped <= 2, f"step {step}: {flipped} pixels of the masks differ"
        if flipped:
            continue
        compared += 1
        for name in figures[0]:
            torch.testing.assert_close(figures[0][name], figures[1][name], rtol=1e-4, atol=1e-5, msg=f"{name} {step}")
        gradients = [[p.grad for p in trainer.update.parameters] for trainer in (fused, reference)]
        largest = max(gradient.abs().max() for gradient in gradients[1])
        for a, b in zip(*gradients, strict=True):  # that of the key's bias is 0 but for rounding
            assert relative_error(a, b) < 1e-3 or (a - b).abs().max() < 1e-6 * largest
        for name in ("entries", "ids", "counts", "cursor"):
            torch.testing.assert_close(getattr(fused.model.memory, name), getattr(reference.model.memory, name))
    assert compared >= 0.95 * STEPS
    assert fused.model.memory.counts.all()


def recorded(trainer):
    """A list that receives the masks of every step of a trainer."""
    made, original = [], trainer.objective.masks

    def masks(*args, **kwargs):
        result = original(*args, **kwargs)
        made.append(list(result.named().values()))
        return result

    trainer.objective.masks = masks
    return made
