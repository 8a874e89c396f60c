"""Converting on a cluster: processes of their own that share a file system."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ProcessPoolExecutor

import pytest
from raw_gguf import layer, write_split

import fuseweights

distributed = pytest.importorskip("distributed", reason="needs fuseweights[dask]")


@pytest.fixture(scope="module")
def cluster():
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        yield cluster


@pytest.fixture
def split(tmp_path):
    return write_split(tmp_path, [layer(n, q=400, kv=200, k_width=4096) for n in range(8)])


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_dask_writes_what_one_thread_writes(tmp_path, split, cluster):
    seen = []
    with distributed.Client(cluster) as client:
        fuseweights.convert(
            split,
            tmp_path / "there",
            executor=client.get_executor(),
            progress=lambda done, total: seen.append((done, total)),
        )
    fuseweights.convert(split, tmp_path / "here", threads=1)
    assert files(tmp_path / "there") == files(tmp_path / "here")
    assert len(seen) == 8 and seen[-1][0] == seen[-1][1]


def test_a_worker_killed_in_mid_run(tmp_path, split, cluster):
    """Its files are written again by another; nothing that it began stays behind."""
    killed = []

    def kill_once(done, total):
        if not killed:
            pids = [worker.process.pid for worker in cluster.workers.values()]
            killed.append(pids[0])
            os.kill(pids[0], signal.SIGKILL)

    with distributed.Client(cluster) as client:
        fuseweights.convert(
            split, tmp_path / "there", executor=client.get_executor(), progress=kill_once
        )
    assert killed
    fuseweights.convert(split, tmp_path / "here", threads=1)
    assert files(tmp_path / "there") == files(tmp_path / "here")
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_any_executor_serves(tmp_path, split):
    with ProcessPoolExecutor(2) as executor:
        fuseweights.convert(split, tmp_path / "there", executor=executor)
    assert fuseweights.verify(split, tmp_path / "there" / split.name).ok


def test_a_failing_task_leaves_nothing_but_what_can_be_resumed(tmp_path, split):
    class Broken(ProcessPoolExecutor):
        def submit(self, function, output, *args):
            if output.name.endswith("00005-of-00008.gguf"):
                return super().submit(os.strerror, "not a number")
            return super().submit(function, output, *args)

    with Broken(1) as executor, pytest.raises(TypeError) as caught:
        fuseweights.convert(split, tmp_path / "there", executor=executor)
    assert not (tmp_path / "there").exists()
    assert any("--resume" in note for note in caught.value.__notes__)
    fuseweights.convert(split, tmp_path / "there", resume=True)
    assert fuseweights.verify(split, tmp_path / "there" / split.name).ok


def test_the_command_line_takes_a_scheduler(tmp_path, split, cluster):
    import subprocess
    import sys

    command = [sys.executable, "-m", "fuseweights", "convert", str(split), str(tmp_path / "there")]
    done = subprocess.run(
        [*command, "--scheduler", cluster.scheduler_address], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert fuseweights.verify(split, tmp_path / "there" / split.name).ok
    nobody = subprocess.run(
        [*command[:-1], str(tmp_path / "x"), "--scheduler", "tcp://127.0.0.1:9"],
        capture_output=True,
        text=True,
    )
    assert nobody.returncode == 2 and "no Dask scheduler answers" in nobody.stderr
