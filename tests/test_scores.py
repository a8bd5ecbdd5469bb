"""What the scores are of: which prediction, which tags, which mask."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from runs import short
from test_method import make

from mcic.cli import main
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


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two epochs, evaluated after each."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    Trainer(short(folder, method={"pool_threshold": 0.2}, eval={"every": 1})).fit()
    return folder


def test_the_train_split_is_scored_again(run):
    summary = json.loads((run / "summary.json").read_text())
    again = evaluate_run(run, split="train")
    scores = {name: value for name, value in summary.items() if name.startswith("train/mask")}
    assert len(scores) == 8
    assert {name: again[name] for name in scores} == pytest.approx(scores)
    assert again["images"] == summary["mask_images"] == 4


def test_any_checkpoint_is_scored(run):
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    scores = {f"step-{line['step']:08d}": line["val/miou"] for line in lines}
    assert len(set(scores.values())) == 2
    for name, score in scores.items():
        assert evaluate_run(run, checkpoint=name)["val/miou"] == pytest.approx(score)
    assert evaluate_run(run)["checkpoint"] == max(scores)
    assert evaluate_run(run, checkpoint="best")["checkpoint"] == max(scores, key=scores.__getitem__)
    shutil.copytree(run / "checkpoints" / min(scores), run / "checkpoints" / f"{min(scores)}-kept")
    (run / "checkpoints" / min(scores)).rename(run / "checkpoints" / f".{min(scores)}.old.partial")
    assert evaluate_run(run, checkpoint=min(scores))["val/miou"] == pytest.approx(scores[min(scores)])
    assert evaluate_run(run, checkpoint="best")["checkpoint"] == max(scores, key=scores.__getitem__)
    with pytest.raises(ValueError, match=r"--checkpoint must be newest, best or one of step-0.*, got 'step-7'"):
        evaluate_run(run, checkpoint="step-7")


def test_without_evaluations_no_checkpoint_is_the_best(tmp_path):
    Trainer(short(tmp_path / "run", train={"epochs": 1}, eval={"mask_images": 0})).fit()
    assert evaluate_run(tmp_path / "run", checkpoint="best")["checkpoint"] == "step-00000004"
    (tmp_path / "run" / "evaluations.jsonl").unlink()
    with pytest.raises(ValueError, match=r"was evaluated on val, so none is the best"):
        evaluate_run(tmp_path / "run", checkpoint="best")


def test_two_ranks_score_what_one_does(run, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    code = "import sys; from mcic.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "evaluate", str(run), "--json", str(tmp_path / "scores.json")]
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("val/miou ") == 1
    assert json.loads((tmp_path / "scores.json").read_text()) == evaluate_run(run)


def test_scores_go_where_a_program_reads_them(run, tmp_path, capsys):
    code = "import sys; from mcic.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "evaluate", str(run), "--split", "train", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout)["images"] == 4
    assert "sparse_attention on cpu" in done.stderr
    tags = tmp_path / "tags.json"
    tags.write_text('{"a.jpg": ["cat"]}')
    assert main(["evaluate", str(run), "--json", str(tags)]) == 2
    assert "is a file of another kind" in capsys.readouterr().err
    assert tags.read_text() == '{"a.jpg": ["cat"]}'


def test_a_run_whose_data_moved_says_where_to_write_it(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("name: shapes", "name: folder"))
    with pytest.raises(ValueError, match=r"where data moved, edit .*config.yaml"):
        evaluate_run(tmp_path / "run")
