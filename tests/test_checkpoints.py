"""A run that cannot write or read a checkpoint says so in one line, and what was there before is still there."""

from __future__ import annotations

import resource
import shutil
import zipfile

import pytest
import torch

pytest.importorskip("peft", reason="training needs the train extra")
pytest.importorskip("datasets", reason="training needs the train extra")

from anyorder.training import checkpoints
from anyorder.training.trainer import AnyOrderTrainer
from training_runs import ALL_CHECKPOINTS, adapt, curve

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def cut_run(trained_run, tmp_path):
    """A run of 30 steps that was killed after its checkpoints at steps 10 and 20."""
    output = tmp_path / "run"
    shutil.copytree(trained_run, output)
    (output / "adapter_model.safetensors").unlink()
    shutil.rmtree(output / "checkpoints" / "checkpoint-30")
    return output


def error(capsys):
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(file, cut_run, checkpoint, stories, capsys):
    newest = cut_run / "checkpoints" / "checkpoint-20"
    (newest / file).write_bytes((newest / file).read_bytes()[:100])
    assert adapt(checkpoint, stories, cut_run, *ALL_CHECKPOINTS, "--resume") == 2
    message = error(capsys)
    assert f"{newest} is damaged ({file}: " in message
    assert "delete it to go on from checkpoint-10" in message


def test_a_file_that_is_missing_or_was_changed_is_damage(trained_run, tmp_path):
    newest = tmp_path / "checkpoint-30"
    shutil.copytree(trained_run / "checkpoints" / "checkpoint-30", newest)
    whole = (newest / "optimizer.pt").read_bytes()
    with zipfile.ZipFile(newest / "optimizer.pt") as parts:
        tensor = max(parts.infolist(), key=lambda part: part.file_size)
    place = tensor.header_offset + 200 + tensor.file_size // 2
    (newest / "optimizer.pt").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    said = r"is damaged \(optimizer.pt: .*; there is no older one: start anew"
    with pytest.raises(ValueError, match=said), checkpoints.reading(newest):
        raise RuntimeError("whatever a reader says")
    (newest / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"is damaged \(.*optimizer.pt"), checkpoints.reading(newest):
        (newest / "optimizer.pt").read_bytes()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
        PermissionError(13, "Permission denied"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_no_damage_is_told_as_it_is(error, cut_run, checkpoint, stories, capsys, monkeypatch):
    def fails(*arguments):
        raise error

    monkeypatch.setattr("anyorder.training.trainer.read_weights", fails)
    assert adapt(checkpoint, stories, cut_run, *ALL_CHECKPOINTS, "--resume") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert (str(error) or "MemoryError") in message
    assert "damaged" not in message


def test_folders_beside_the_checkpoints_are_left_alone(cut_run):
    folder = cut_run / "checkpoints"
    for name in ("checkpoint-best", "checkpoint-10-copy", "checkpoint-"):
        shutil.copytree(folder / "checkpoint-10", folder / name)
    assert [path.name for path in checkpoints.complete(folder)] == ["checkpoint-10", "checkpoint-20"]


def test_a_checkpoint_that_was_cut_while_it_was_written_is_passed_over(
    cut_run, trained_run, checkpoint, stories, caplog
):
    folder = cut_run / "checkpoints"
    (folder / "checkpoint-20" / "trainer_state.json").write_text('{"global_st')
    assert [path.name for path in checkpoints.complete(folder)] == ["checkpoint-10"]
    assert "checkpoint-20 was not written to its end: passed over" in caplog.text
    shutil.copytree(folder / "checkpoint-10", folder / "checkpoint-best")  # somebody's own
    assert adapt(checkpoint, stories, cut_run, *ALL_CHECKPOINTS, "--resume") == 0
    assert curve(cut_run) == curve(trained_run)


def test_a_full_disk_leaves_the_earlier_checkpoint_and_says_so(
    trained_run, checkpoint, stories, tmp_path, capsys, monkeypatch
):
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
    assert curve(output) == curve(trained_run)


def test_the_best_checkpoint_is_kept(checkpoint, stories, tmp_path, monkeypatch):
    losses = iter([5.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    monkeypatch.setattr("anyorder.training.heldout.HeldOut.losses", lambda self, model: {"random_1": next(losses)})
    more = ("--eval-file", stories, "--eval-every", 7)
    assert adapt(checkpoint, stories, tmp_path / "run", *more) == 0
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {"checkpoint-7", "checkpoint-30"}
