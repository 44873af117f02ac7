"""Several real processes: they agree with each other and with a single one, and a killed run resumes bit for bit."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import chex
import numpy as np
import pytest


pytestmark = pytest.mark.slow


PROGRAM = pathlib.Path(__file__).parent / "cluster.py"
STEPS = 30
# XLA divides a matrix product between its threads, so their number decides the last bits. By default there are as many as
# cores, or as devices if these are more.
THREADS = {"NPROC": "4"}


class Job:
    """A run of cluster.py in so many processes; none outlives the `with`."""

    def __init__(self, folder, processes, state_dtype, devices=1, checkpoints="checkpoints", out="out"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.out = [folder / f"{out}{i}.npz" for i in range(processes)]
        self.logs = [folder / f"{out}{i}.log" for i in range(processes)]
        command = [sys.executable, str(PROGRAM), f"--processes={processes}", f"--devices={devices}", f"--port={port}"]
        command += [f"--checkpoints={folder / checkpoints}", f"--out={folder / out}", f"--steps={STEPS}"]
        command += [f"--state-dtype={state_dtype}"] if state_dtype else []
        with contextlib.ExitStack() as files:
            self.processes = [
                subprocess.Popen(
                    [*command, f"--process={i}"],
                    stdout=files.enter_context(log.open("w")),
                    stderr=subprocess.STDOUT,
                    env=os.environ | THREADS,
                )
                for i, log in enumerate(self.logs)
            ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def log(self):
        return "".join(log.read_text() for log in self.logs)

    def result(self):
        """The last parameters and state of every process."""
        codes = [process.wait(timeout=400) for process in self.processes]
        assert codes == [0] * len(codes), self.log()
        return [list(np.load(file).values()) for file in self.out]

    def wait_for(self, text, process):
        while text not in self.logs[process].read_text():
            assert self.processes[process].poll() is None, self.log()
            time.sleep(0.01)


def test_a_killed_job_ends_as_if_nothing_had_happened(tmp_path):
    with Job(tmp_path, 2, "uint8", checkpoints="never") as job:
        never_killed = job.result()
        losses = [float(x) for x in re.findall(r"process 0: .* loss (\S+)", job.log())]
    chex.assert_trees_all_equal(*never_killed)
    assert len(losses) == STEPS
    assert np.mean(losses[-5:]) < losses[0] / 4
    # Two summands have one order: one process with two devices comes to the same bits.
    with Job(tmp_path, 1, "uint8", devices=2, checkpoints="one", out="one") as job:
        chex.assert_trees_all_equal(never_killed[0], *job.result())

    with Job(tmp_path, 2, "uint8") as job:
        job.wait_for("step 25,", process=1)
        job.processes[1].send_signal(signal.SIGKILL)
        assert job.processes[1].wait() == -signal.SIGKILL
        print(job.log())
    with Job(tmp_path, 2, "uint8") as job:
        resumed = job.result()
        print(job.log())
        starts = re.findall(r"process (\d): goes on from step (\d+)", job.log())
    assert starts in ([("0", "10"), ("1", "10")], [("0", "20"), ("1", "20")])
    for run in resumed:
        chex.assert_trees_all_equal(never_killed[0], run)
