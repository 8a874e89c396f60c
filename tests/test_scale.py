"""A checkpoint of DeepSeek-V3's size: 90,000 tensors in 163 files, true headers, holes for data."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import sparse_models

CODE = """
import json, sys, time
import fuseweights
plan = fuseweights.plan(sys.argv[1], consumer="torch")
status = open("/proc/self/status").read()
print(json.dumps({
    "tensors": len(plan.checkpoint.tensors),
    "groups": len(plan.groups),
    "refusals": len(plan.refusals),
    "bytes": plan.bytes,
    "seconds": time.process_time(),
    "peak_kb": int(status.split("VmHWM:")[1].split()[0]),
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads its own peak memory from /proc")
def test_a_plan_of_ninety_thousand_tensors(tmp_path):
    """In 1.6 seconds of processor time and 160 MB; the limits leave room for slow machines."""
    source = sparse_models.deepseek_v3(tmp_path / "deepseek")
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(source)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["tensors"] > 90_000
    # every layer's MLA, three dense MLPs, 58 layers of experts and of shared experts
    assert (found["groups"], found["refusals"]) == (61 + 3 + 58 + 58, 0)
    assert found["bytes"] > 600e9
    assert found["peak_kb"] < 200_000
    assert found["seconds"] < 6


def test_a_name_among_many_is_still_matched_whole(tmp_path):
    """The small form of it: two layers, three experts, two files."""
    import fuseweights

    source = sparse_models.deepseek_v3(tmp_path / "small", layers=5, experts=3, files=2)
    plan = fuseweights.plan(source, consumer="torch")
    counts = {g: sum(x.group == g for x in plan.groups) for g in ("qkv_a", "gate_up", "experts")}
    assert counts == {"qkv_a": 5, "gate_up": 3, "experts": 2}
    assert [o.name for o in plan.outputs][:2] == [f.path.name for f in plan.checkpoint.files]
