"""`varprop data tokenize`: what it prints, and what a signal, a kill or a full disk leaves."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.corpus.conftest import END, TEXTS
from varprop.__main__ import main
from varprop.corpus import tokenize

from .test_build import names, sides


def test_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "tokenize", "a.txt", "--tokenizer", "tokenizer.json", "--out", "out"]
    assert main([*command, "--validation-fraction", "0.2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    train, held_out = (len("".join(texts).encode()) + len(texts) for texts in sides(TEXTS, 0.2))
    assert printed[0].startswith(f"train: {train:,} tokens of ")
    assert printed[1].startswith(f"validation: {held_out:,} tokens of ")
    assert printed[2] == "wrote out"
    assert main(["data", "tokenize", "none.txt", "--tokenizer", "tokenizer.json", "--out", "x"]) == 2
    assert main([*command, "--validation-fraction", "0.2", "--validation", "a.txt"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "varprop: input='none.txt' is missing, or no file; expected a file"
    assert len(lines) == 2


PROGRAM = """
import argparse, sys
from varprop import cli_data
from varprop.errors import VarpropError
parser = argparse.ArgumentParser()
cli_data.add(parser)
try:
    sys.exit(cli_data.run(parser.parse_args()))
except VarpropError as error:
    sys.exit(str(error))
"""
"""The command without the others, whose modules take long to load."""
TOKENIZE = ("tokenize", "long.txt", "--tokenizer", "tokenizer.json", "--out", "out")


def started(*command: str) -> subprocess.Popen:
    """A command on a text that takes long, once it has begun to write."""
    with Path("long.txt").open("w") as stream:
        for _ in range(3000):
            stream.write(f"{'some words ' * 1000}{END}")
    command = (sys.executable, *command)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not any(path.stat().st_size for path in Path().glob(".out.*.part/new/train.u16")):
        assert process.poll() is None
        time.sleep(0.02)
    return process


def test_a_request_to_end_leaves_nothing(folder: Path) -> None:
    before = names(folder)
    process = started("-c", PROGRAM, *TOKENIZE)
    process.terminate()
    assert "KeyboardInterrupt" in process.communicate(timeout=60)[1]
    assert names(folder) == before | {"long.txt"}


@pytest.mark.long
@pytest.mark.parametrize("n_workers", ["1", "2"])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_of_the_command_is_one_line(folder: Path, sent: signal.Signals, n_workers: str) -> None:
    before = names(folder)
    process = started("-m", "varprop", "data", *TOKENIZE, "--n-workers", n_workers)
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # as a terminal does: to the workers too
    else:
        process.send_signal(sent)
    assert process.communicate(timeout=60)[1] == "varprop: interrupted\n"
    assert process.returncode == 130
    assert names(folder) == before | {"long.txt"}


def gone(pid: str) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_a_kill_leaves_no_corpus_and_no_process(folder: Path) -> None:
    process = started("-c", PROGRAM, *TOKENIZE, "--n-workers", "2")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.kill()
    process.communicate(timeout=60)
    assert "out" not in names(folder)
    deadline = time.monotonic() + 30
    while not all(map(gone, children)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_a_kill_has_left_goes_at_the_next_run(folder: Path) -> None:
    process = started("-c", PROGRAM, *TOKENIZE)
    process.kill()
    process.communicate(timeout=60)
    (abandoned,) = Path().glob(".out.*.part")
    other, live = Path(".output.aaaa.part"), Path(".out.aaaa.part")
    for path in (other, live):
        path.mkdir()
    (other / "lock").touch()
    with (live / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tokenize(["a.txt"], "tokenizer.json", "out", validation_fraction=0.5)
    assert not abandoned.exists()
    assert {path.name for path in Path().glob(".*.part")} == {other.name, live.name}
    assert names(Path("out")) == {"train.u16", "validation.u16", "manifest.json", "tokenizer.json"}


def test_a_full_disk_is_one_line_and_leaves_nothing(folder: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits of file sizes are those of POSIX")
    Path("long.txt").write_text(END.join(f"{number} " * 5000 for number in range(20)))
    before = names(folder)
    limit = 30_000  # bytes of a file: above the tokenizer, below the tokens
    assert Path("tokenizer.json").stat().st_size < limit
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, *TOKENIZE, "--validation-fraction", "0.5"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.stderr == "output='out' cannot be written (File too large); expected a writable path\n"
    assert names(folder) == before
