"""A run that cannot write or read a checkpoint says so in one line, and what was there before is still there."""

from __future__ import annotations

import resource
import shutil

import pytest

pytest.importorskip("peft", reason="training needs the train extra")
pytest.importorskip("datasets", reason="training needs the train extra")

from anyorder.training import checkpoints
from anyorder.training.trainer import AnyOrderTrainer
from training_runs import adapt, curve

pytestmark = pytest.mark.filterwarnings("ignore")


MORE = ("--training", "save_total_limit=3")


@pytest.fixture
def cut_run(checkpoint, stories, tmp_path):
    """A run of 30 steps that was killed after its checkpoints at steps 10 and 20."""
    output = tmp_path / "run"
    assert adapt(checkpoint, stories, output, *MORE) == 0
    (output / "adapter_model.safetensors").unlink()
    shutil.rmtree(output / "checkpoints" / "checkpoint-30")
    return output


def error(capsys):
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(file, cut_run, checkpoint, stories, capsys):
    newest = cut_run / "checkpoints" / "checkpoint-20"
    (newest / file).write_bytes((newest / file).read_bytes()[:100])
    assert adapt(checkpoint, stories, cut_run, *MORE, "--resume") == 2
    message = error(capsys)
    assert f"{newest} is damaged" in message
    assert "delete it to go on from checkpoint-10" in message
    shutil.rmtree(newest)
    assert adapt(checkpoint, stories, cut_run, *MORE, "--resume") == 0
    assert len(curve(cut_run)) == 30


def test_a_checkpoint_that_was_cut_while_it_was_written_is_passed_over(cut_run, checkpoint, stories, caplog):
    folder = cut_run / "checkpoints"
    (folder / "checkpoint-20" / "trainer_state.json").write_text('{"global_st')
    assert [path.name for path in checkpoints.complete(folder)] == ["checkpoint-10"]
    assert "checkpoint-20 was not written to its end: passed over" in caplog.text
    assert adapt(checkpoint, stories, cut_run, *MORE, "--resume") == 0


def test_a_full_disk_leaves_the_earlier_checkpoint_and_says_so(checkpoint, stories, tmp_path, capsys, monkeypatch):
    save, limits = AnyOrderTrainer._save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(self, model, trial):
        if self.state.global_step == 20:  # the operating system refuses to let files grow beyond 4 kB
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            save(self, model, trial)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(AnyOrderTrainer, "_save_checkpoint", full)
    output = tmp_path / "run"
    assert adapt(checkpoint, stories, output) == 2
    message = error(capsys)
    assert "checkpoint-20 could not be written" in message
    assert "checkpoint-10 is intact: make room and go on with --resume" in message
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["checkpoint-10"]
    monkeypatch.setattr(AnyOrderTrainer, "_save_checkpoint", save)
    assert adapt(checkpoint, stories, output, "--resume") == 0
    assert adapt(checkpoint, stories, tmp_path / "whole") == 0
    assert curve(output) == curve(tmp_path / "whole")


def test_the_best_checkpoint_is_kept(checkpoint, stories, tmp_path, monkeypatch):
    losses = iter([5.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    monkeypatch.setattr("anyorder.training.heldout.HeldOut.losses", lambda self, model: {"random_1": next(losses)})
    assert adapt(checkpoint, stories, tmp_path / "run", "--eval-file", stories, "--eval-every", 7) == 0
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {"checkpoint-7", "checkpoint-30"}
