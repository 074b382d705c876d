"""`--ray`: files of texts to files of results by two workers; what was stopped goes on, and nothing is twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pytest
from pyarrow import parquet

import local_ray  # (first: it says how Ray is to be imported)
from anyorder.cli.on_ray import Workers
from command_line import run
from result_files import TEXTS, lines, plain, rows_of, same


@pytest.fixture(scope="module")
def _cluster():
    with local_ray.cluster():
        yield


# ---------------------------------------------------------------------- the cluster

COMMANDS = [
    ("generate", ["--max-new-tokens", 5, "--temperature", 0.8, "--seed", 3], ""),
    ("generate", ["--max-new-tokens", 5, "--temperature", 0.8, "--seed", 3, "--group-size", 2], ",slots=3,context=64"),
    ("infill", ["--seed", 4, "--temperature", 0.7, "--length", "1-3"], ""),
    ("infill", ["--seed", 4, "--temperature", 0.7, "--policy", "dynamic:criterion=entropy"], ",slots=4,context=64"),
    ("score", ["--order", "random", "--group-size", 2, "--seed", 5], ",slots=2"),
]


@pytest.mark.slow
@pytest.mark.usefixtures("_cluster")
@pytest.mark.parametrize(("command", "options", "more"), COMMANDS)
def test_results_are_those_without_ray(capsys, checkpoint, tmp_path, command, options, more):
    texts = [f"{text} ___." for text in TEXTS] if command == "infill" else list(TEXTS)
    texts[4] = ""  # passed through
    if command == "infill":
        texts[7] = "no blank"  # an error of its own
    lines(tmp_path / "in.jsonl", texts)
    code, out, errors = run(
        capsys, command, "--model", checkpoint, "--file", tmp_path / "in.jsonl", "--out", tmp_path / "out",
        f"--ray=count=2,rows=5{more}", "--json", *options,
    )  # fmt: skip
    wrong = int(command == "infill")
    assert code == 2 * wrong, errors
    assert json.loads(out) == {
        "directory": str(tmp_path / "out"), "texts": 23, "errors": wrong, "files": 5, "new": 5,
    }  # fmt: skip
    found = rows_of(tmp_path / "out")
    assert [row["number"] for row in found] == list(range(23))
    for row, record in zip(found, plain(capsys, command, checkpoint, texts, tmp_path, *options), strict=True):
        same(row, record)


@pytest.mark.slow
@pytest.mark.usefixtures("_cluster")
def test_parquet_of_many_row_groups_and_several_files(capsys, checkpoint, tmp_path):
    source = tmp_path / "in"
    (source / "more").mkdir(parents=True)
    parquet.write_table(pa.table({"prompt": TEXTS[:14], "x": range(14)}), source / "a.parquet", row_group_size=3)
    lines(source / "b.jsonl", TEXTS[14:20], "prompt")
    parquet.write_table(pa.table({"prompt": [*TEXTS[20:22], None]}), source / "more" / "c.parquet")
    code, _, _ = run(
        capsys, "score", "--model", checkpoint, "--file", f"file://{source}", "--out", tmp_path / "out",
        "--ray=rows=4,column=prompt",
    )  # fmt: skip
    assert code == 2
    found = rows_of(tmp_path / "out")
    assert [row["text"] for row in found] == [*TEXTS[:22], None]
    assert found[-1]["error"] == "'prompt' is no text but None"
    for row, record in zip(found[:-1], plain(capsys, "score", checkpoint, TEXTS[:22], tmp_path), strict=True):
        same(row, record)


@pytest.mark.slow
@pytest.mark.usefixtures("_cluster")
def test_what_is_missing_is_done_again_and_nothing_else(capsys, checkpoint, tmp_path):
    lines(tmp_path / "in.jsonl", TEXTS)
    out = tmp_path / "out"
    arguments = ["score", "--model", checkpoint, "--file", tmp_path / "in.jsonl", "--out", out, "--ray=rows=4"]
    assert run(capsys, *arguments)[0] == 0
    whole = {file.name: file.read_bytes() for file in out.iterdir()}
    gone = sorted(whole)[2]
    (out / gone).unlink()
    (out / f".{gone}.0123").write_bytes(whole[gone][:50])  # a worker was killed while it wrote
    kept = {file.name: file.stat().st_mtime_ns for file in out.glob("*.parquet")}
    code, printed, _ = run(capsys, *arguments)
    assert code == 0
    assert "23 texts in 6 files, 1 of them new; 0 errors" in printed
    assert {file.name: file.read_bytes() for file in out.iterdir()} == whole
    assert all((out / name).stat().st_mtime_ns == when for name, when in kept.items())
    code, _, errors = run(capsys, *arguments, "--group-size", "2")
    assert code == 2
    assert "6 files of another job (group_size was 1 and is 2): choose another directory" in errors
    lines(tmp_path / "in.jsonl", TEXTS[1:])
    assert "(other texts, or blocks of other sizes)" in run(capsys, *arguments)[2]


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(capsys, checkpoint, tmp_path):
    """Kill -9 of a worker on the way, then of the command itself; the second run ends as one that nobody disturbed."""
    lines(tmp_path / "in.jsonl", TEXTS * 20)
    arguments = [
        "generate", "--model", str(checkpoint), "--file", str(tmp_path / "in.jsonl"), "--max-new-tokens", "20",
        "--sample", "--seed", "1",
    ]  # fmt: skip
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    command = [sys.executable, "-m", "anyorder", *arguments, "--out", str(stopped), "--ray=count=2,rows=10"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        files_in(stopped, 4, process)
        os.kill(local_ray.workers("MapWorker", process.pid)[0], signal.SIGKILL)
        files_in(stopped, 20, process)
        local_ray.kill(process.pid)
    there = {file.name: file.stat().st_mtime_ns for file in stopped.glob("*.parquet")}
    assert 20 <= len(there) < 46
    with local_ray.cluster():
        assert run(capsys, *arguments, "--out", stopped, "--ray=count=2,rows=10")[0] == 0
        assert run(capsys, *arguments, "--out", whole, "--ray=count=1,rows=10")[0] == 0
    assert {file.name: file.read_bytes() for file in stopped.iterdir()} == {
        file.name: file.read_bytes() for file in whole.iterdir()
    }
    assert all((stopped / name).stat().st_mtime_ns == when for name, when in there.items())
    assert [row["number"] for row in rows_of(stopped)] == list(range(460))


def files_in(directory, count, process):
    until = time.monotonic() + 600
    while len(list(directory.glob("*.parquet"))) < count:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < until
        time.sleep(0.05)


# ---------------------------------------------------------------------- without a cluster


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ray"], "name both"),
        (["--ray", "--file", "in.jsonl"], "name both"),
        (["--out", "x", "a text"], "--out is for --ray"),
        (["--ray=slots=2", "--file", "in.jsonl", "--out", "x", "--compile"], "leave them out"),
        (["--ray=slots=2", "--file", "in.jsonl", "--out", "x", "--engine", "cuda_graphs"], "leave them out"),
        (["--ray=count=-1", "--file", "in.jsonl", "--out", "x"], "from 0 up"),
        (["--ray=rows=two", "--file", "in.jsonl", "--out", "x"], "--ray rows=two"),
        (["--ray=slot=2", "--file", "in.jsonl", "--out", "x"], "did you mean 'slots'?"),
        (["--ray=slots", "--file", "in.jsonl", "--out", "x"], "--ray 'slots' must be NAME=VALUE"),
        (["--ray=column=prompt", "--file", "in.jsonl", "--out", "x"], "no column 'prompt': name one of id, text"),
        (["--ray", "--file", "no.jsonl", "--out", "x"], "no file or directory no.jsonl"),
        (["--ray", "--file", "in.csv", "--out", "x"], "none of .parquet, .jsonl"),
        (["--ray", "--file", "bad.parquet", "--out", "x"], "no Parquet file"),
        (["--ray", "--file", "nothing://x", "--out", "x"], "cannot be reached"),
        (["--ray", "--file", "in.jsonl", "--out", "x", "--watch"], "--watch"),
        (["--ray", "--file", "in.jsonl", "--out", "x", "--lines"], "--lines"),
    ],
)
def test_mistakes(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "in.jsonl", TEXTS)
    for name in ("in.csv", "bad.parquet"):
        (tmp_path / name).write_text("a")
    code, out, errors = run(capsys, "generate", *arguments)
    assert (code, out) == (2, "")
    assert message in errors
    assert not (tmp_path / "x").exists()


def test_the_help_page_names_the_options(capsys):
    with pytest.raises(SystemExit):
        run(capsys, "generate", "--help")
    page = capsys.readouterr().out
    assert all(name in page for name in vars(Workers()))
