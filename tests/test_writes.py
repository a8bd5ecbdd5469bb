"""Every write of a run and of the commands, where the disk is full, read-only, or the folder is gone."""

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mcic import checkpoint, durable
from mcic.checkpoint import checkpoints, verify_checkpoint
from mcic.cli import main

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

FLAGS = (
    "shapes --data.train-images 4 --data.val-images 2 --data.saliency none --train.epochs 2 --train.batch-size 2 "
    "--train.size 33 --eval.every 1 --eval.mask-images 2 --run.previews 1 --run.device cpu"
)
OPTIONAL = ("tensorboard", "previews", "report.html")


@dataclass(frozen=True)
class Outcome:
    """How a command ended: exit status and all that it printed."""

    status: int
    said: str


def attempt(arguments: list[str], prepare: Callable[[], object] = lambda: None) -> Outcome:
    """Run `mcic` in a forked process, after `prepare`."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        torch.set_num_threads(1)
        prepare()
        status = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    os.close(writer)
    with os.fdopen(reader, errors="replace") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return Outcome(os.waitstatus_to_exitcode(status), said)


class Fault:
    """Within the process that calls it, the `number`-th write of the kind `place` below `root` fails.

    A write is a file that is opened for it, brought to the disk or renamed, a new folder, or a file of tensors, of
    which one half is written. `place` None: none fails, and the kind of each is a line of `root/../places`.
    """

    def __init__(self, root: Path, place: str | None = None, number: int = 1, *, code: int = errno.ENOSPC) -> None:
        self.root, self.place, self.number, self.code = str(root), place, number, code

    def __call__(self) -> None:
        sys.addaudithook(self._hear)
        sync, save_file = durable.sync, checkpoint.save_file

        def failing_sync(path):
            self._visit("sync", path)
            sync(path)

        def failing_save(tensors, path):
            try:
                self._visit("tensors", path)
            except OSError as error:
                save_file(tensors, path)
                os.truncate(path, os.path.getsize(path) // 2)
                raise checkpoint.SafetensorError(f"I/O error: {error.strerror}") from error
            save_file(tensors, path)

        durable.sync, checkpoint.save_file = failing_sync, failing_save

    def _hear(self, event, arguments):
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self._visit("open", arguments[0])
        elif event in ("os.mkdir", "os.rename"):
            self._visit(event, arguments[event == "os.rename"])

    def _visit(self, what, path):
        path = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if not path.startswith(self.root) or (what == "os.mkdir" and os.path.isdir(path)):
            return
        kind = re.sub(r"tfevents.*", "tfevents", re.sub(r"\d+", "#", os.path.relpath(path, self.root)))
        if self.place is None:
            with open(f"{os.path.dirname(self.root)}/places", "a") as file:
                file.write(f"{what} {kind}\n")
        elif self.place == f"{what} {kind}":
            self.number -= 1
            if self.number == 0:
                raise OSError(self.code, os.strerror(self.code), path)


def places_of(arguments: list[str], root: Path) -> Counter[str]:
    """How often a command that nothing disturbs writes what below `root`."""
    done = attempt(arguments, Fault(root))
    assert done.status == 0, done.said
    return Counter((root.parent / "places").read_text().splitlines())


def debris(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.name.endswith((".partial", ".tmp"))]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run / "checkpoints")[-1] / "model.safetensors")


def train(run: Path, *more: str) -> list[str]:
    return ["train", *FLAGS.split(), "--run.dir", str(run), "--run.resume", "auto", *more]


@dataclass(frozen=True)
class Whole:
    """A run that nothing disturbed: its weights, and what it writes where."""

    run: Path
    weights: dict[str, torch.Tensor]
    places: Counter[str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert main(train(folder / "first")) == 0  # in this process: what it imports, those that are forked have
    run = folder / "run"
    return Whole(folder / "first", weights(folder / "first"), places_of(train(run), run))


def assert_clear(outcome: Outcome, run: Path) -> None:
    """One sentence and no traceback; no debris; every checkpoint whole."""
    assert "Traceback" not in outcome.said
    errors = [line for line in outcome.said.splitlines() if line.startswith("mcic: error: ")]
    assert len(errors) == (outcome.status == 2), outcome.said
    assert outcome.status in (0, 2), outcome.said
    assert not debris(run)
    for path in checkpoints(run / "checkpoints"):
        verify_checkpoint(path)


def assert_goes_on(run: Path, whole: Whole) -> None:
    """Once there is room again, the run ends as it would have."""
    again = attempt(train(run))
    assert again.status == 0, again.said
    ours = weights(run)
    assert all(torch.equal(ours[name], tensor) for name, tensor in whole.weights.items())


def assert_outlives(place: str, run: Path, whole: Whole, *, code: int) -> None:
    """The last write of a kind fails: a warning and the run goes on, or a sentence and it can be resumed."""
    outcome = attempt(train(run), Fault(run, place, whole.places[place], code=code))
    assert_clear(outcome, run)
    vital = not place.split()[1].lstrip(".").startswith(OPTIONAL)
    assert outcome.status == (2 if vital else 0), (place, outcome.said)
    assert os.strerror(code) in outcome.said, (place, outcome.said)
    if vital:
        assert_goes_on(run, whole)
    else:
        assert "the run goes on without it" in outcome.said
        assert (run / "summary.json").is_file()
        for half in ("previews/final", "report.html"):
            assert not place.split()[1].startswith(half) or not (run / half).exists(), place


PLACES = {
    "open .config.yaml": errno.ENOSPC,
    "os.mkdir .": errno.EROFS,
    "open metrics.jsonl": errno.EACCES,
    "open tensorboard": errno.ENOSPC,
    "tensors checkpoints/.step": errno.ENOSPC,
    "sync checkpoints/.network.safetensors": errno.EIO,
    "open previews/epoch-#": errno.EROFS,
    "open previews/final/index": errno.ENOSPC,
    "open .summary.json": errno.ENOSPC,
    "open .report.html": errno.ENOSPC,
}
"""with one of the reasons for which the system refuses a write"""


@pytest.mark.parametrize("start", PLACES)
def test_a_write_that_fails(start, whole, tmp_path):
    place = next(place for place in whole.places if place.startswith(start))
    assert_outlives(place, tmp_path / "run", whole, code=PLACES[start])


@pytest.mark.faults
def test_every_write_that_fails(whole, tmp_path):
    for number, place in enumerate(whole.places):
        assert_outlives(place, tmp_path / f"run-{number}", whole, code=(errno.ENOSPC, errno.EROFS)[number % 2])
    print(f"{len(whole.places)} places: every checkpoint whole, nothing half written, every run could go on")


def test_the_folder_vanishes(tmp_path, monkeypatch):
    """What is removed while a run goes on does not come back in part."""
    run = tmp_path / "run"

    def prepare():
        from mcic.trainer import Trainer

        step = Trainer._train_step

        def removing(self, batch):
            if self.step == 2:
                shutil.rmtree(run)
            return step(self, batch)

        Trainer._train_step = removing

    outcome = attempt(train(run), prepare)
    assert outcome.status == 2
    assert f"mcic: error: {run}/metrics.jsonl: No such file or directory" in outcome.said
    assert "Traceback" not in outcome.said
    assert not run.exists()


def test_a_device_that_is_full(tmp_path):
    """Linux keeps one: what is written to it is refused when it is written, not when it is opened."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    run = tmp_path / "run"
    assert attempt(train(run, "--train.epochs", "1")).status == 0
    (run / "summary.json").unlink()
    kept = (run / "metrics.jsonl").read_text()

    def prepare():
        from mcic import log

        def opened(self, *arguments, **options):
            return open(
                "/dev/full" if self.name == "metrics.jsonl" and "a" in arguments else self, *arguments, **options
            )

        log.Path.open = opened

    outcome = attempt(train(run), prepare)
    assert_clear(outcome, run)
    assert outcome.status == 2
    assert f"error: {run}/metrics.jsonl: No space left on device" in outcome.said
    assert (run / "metrics.jsonl").read_text() == kept
    assert attempt(train(run)).status == 0


@pytest.mark.parametrize("limit", [600, 20_000, 400_000])
def test_files_that_may_not_grow(limit, whole, tmp_path):
    """The system itself refuses to write beyond `limit` bytes a file: configuration, figures, or weights do not fit."""
    run = tmp_path / "run"
    outcome = attempt(train(run), lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert_clear(outcome, run)
    assert outcome.status == 2
    assert "File too large" in outcome.said
    assert_goes_on(run, whole)


REAL_DISK = """
mount -t tmpfs -o size={size}k tmpfs {disk} || exit 99
mcic() {{ {python} -c 'import sys; from mcic.cli import main; sys.exit(main())' "$@"; }}
mcic {train}
status=$?
find {disk} -name '*.partial' | grep . && exit 98
mount -o remount,size=64m {disk}
mcic {train} || exit 97
exit $status
"""


@pytest.mark.faults
@pytest.mark.parametrize("size", [64, 1000, 1700, 2400])
def test_a_disk_that_is_full(size, tmp_path):
    """A file system of so many KiB: the run ends with a sentence, and goes on when there is more room."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    script = REAL_DISK.format(
        size=size, disk=tmp_path, python=sys.executable, train=" ".join(train(tmp_path / "run"))
    )  # fmt: skip
    done = subprocess.run(["unshare", "-rm", "bash", "-c", script], capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "No space left on device" in said
    assert "Traceback" not in said
    assert said.count("mcic: error: ") == 1


COMMANDS = {
    "masks": lambda run, out: ["masks", str(run), "--out", str(out / "masks"), "--refine", "none", "--coco"],
    "predict": lambda run, out: ["predict", str(run), str(out.parent / "photos"), "--out", str(out / "predicted")],
    "export": lambda run, out: ["export", str(run), "--out", str(out / "exported"), "--formats", "safetensors"],
    "report": lambda run, out: ["report", str(run), "--out", str(out / "page.html")],
}


@pytest.mark.parametrize(
    "name", [name if name == "report" else pytest.param(name, marks=pytest.mark.faults) for name in COMMANDS]
)
def test_the_other_commands(name, whole, tmp_path):
    """Each kind of write fails once: a sentence, nothing half written, and the same command succeeds afterwards."""
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "photos").mkdir()
    for number in range(2):
        Image.fromarray(np.full((40, 50, 3), 90 * number, np.uint8)).save(tmp_path / "photos" / f"{number}.png")
    command = COMMANDS[name](whole.run, out)
    before = {path: path.read_bytes() for path in whole.run.rglob("*") if path.is_file()}
    places = places_of(command, out)
    expected = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for place in places:
        shutil.rmtree(out)
        out.mkdir()
        outcome = attempt(command, Fault(out, place, places[place]))
        assert "Traceback" not in outcome.said, (place, outcome.said)
        assert outcome.status == 2, (place, outcome.said)
        assert "No space left on device" in outcome.said, (place, outcome.said)
        assert not debris(out), place
        assert attempt(command).status == 0
        assert {path for path in out.rglob("*") if path.is_file()} == set(expected), place
    print(name, sum(places.values()), "writes of", len(places), "kinds")
    assert {path: path.read_bytes() for path in whole.run.rglob("*") if path.is_file()} == before
