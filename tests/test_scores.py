"""What the scores are of: which prediction, which tags, which mask."""

import pytest
import torch
from runs import short
from test_method import make

from mcic.data import EvalItem
from mcic.evaluate import evaluate_masks, evaluate_network, evaluate_run
from mcic.model import Augmented, Prediction
from mcic.trainer import Trainer


def level(*scores):
    """The same scores at every pixel."""
    return torch.tensor(scores, dtype=torch.float32)[None, :, None, None].expand(1, -1, 2, 2)


def test_scores_are_of_what_the_summary_says():
    """Truth 2; tags 1 and 2. s likes 3 best, then 1; s̃ 3, then 2; the CAM says background."""
    model, objective = make()
    model.forward = lambda images: Prediction(level(0.0), level(1, -1, 5), level(0, 2, 1, 3))
    model.read = lambda prediction, tags: Augmented(level(0, 1, 2, 3), None, torch.zeros(1, 4), level(0.0))
    item = EvalItem(
        index=0, full_size=(5, 5), image=torch.zeros(3, 5, 5), pixels=None, tags=torch.tensor([True, True, False]),
        saliency=torch.zeros(5, 5), mask=torch.full((5, 5), 2, dtype=torch.uint8),
    )  # fmt: skip
    device = torch.device("cpu")
    found = evaluate_network(model, [item], protocol="voc", device=device)
    assert {name: matrix.counts.nonzero().tolist() for name, matrix in found.items()} == {
        "network": [[2, 3]], "tags": [[2, 1]], "context": [[2, 2]],
    }  # fmt: skip
    found = evaluate_masks(model, objective, [item], device=device)
    assert {name: (matrix.counts.nonzero().tolist(), matrix.coverage()) for name, matrix in found.items()} == {
        "cam": ([[2, 0]], 100), "seg": ([[2, 1]], 100), "context": ([[2, 2]], 100), "merged": ([[2, 0]], 0),
    }  # fmt: skip


def test_the_train_split_is_scored_again(tmp_path):
    summary = Trainer(short(tmp_path / "run", train={"epochs": 1}, method={"pool_threshold": 0.2})).fit()
    again = evaluate_run(tmp_path / "run", split="train")
    scores = {name: value for name, value in summary.items() if name.startswith("train/mask")}
    assert len(scores) == 8
    assert {name: again[name] for name in scores} == pytest.approx(scores)
