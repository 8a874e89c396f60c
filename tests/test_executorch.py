"""The fused Qwen3.5 of examples/export_executorch.py, run by ExecuTorch, against PyTorch."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("executorch", reason="needs executorch (1.4.1 for torch 2.13)")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import export_executorch as example  # noqa: E402

from fuseweights.nn import FusedLinear  # noqa: E402

torch.set_num_threads(1)
TOLERANCE = 5e-6  # measured 1.3e-6: float32's rounding, of other kernels, through two layers


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The .pte and what the example measured."""
    path = tmp_path_factory.mktemp("executorch") / "qwen3_5.pte"
    return path, example.main(path)


def test_equal_to_pytorch(exported):
    """Prompt and tokens: equal to the fused and the unfused model within float32's rounding, and as
    near to float64 as PyTorch is."""
    _, found = exported
    assert len(found["executorch - fused"]) == 1 + example.STEPS
    assert max(found["executorch - fused"]) <= TOLERANCE
    assert max(found["executorch - transformers"]) <= TOLERANCE
    assert max(found["executorch - float64"]) <= 2 * max(found["fused - float64"])


def test_both_methods_read_one_fused_weight(exported):
    stored, decoder = exported[0].read_bytes(), example.Decoder(example.qwen())
    weights = {n: p for n, p in decoder.named_parameters() if "in_proj" in n or "qkv_proj" in n}
    assert len(weights) == 2
    for weight in weights.values():
        assert stored.count(weight.detach().numpy().tobytes()) == 1


@pytest.mark.parametrize(
    "name, at",
    [
        ("layers.0.mixer.in_proj.weight", -1),  # a single row: the last head's a
        ("layers.1.mixer.qkv_proj.weight", 16),  # the first head's gate
        ("layers.1.mlp.gate_up_proj.weight", 96),  # up's first
    ],
)
def test_the_comparison_notices_one_row(exported, name, at):
    """What test_equal_to_pytorch asserts fails for a model that differs by a hundredth in one row
    of one fused weight."""
    model = example.qwen()
    decoder, calls = example.Decoder(model), example.inputs(model)
    ran = example.play(example.load(exported[0]), calls)
    assert max(example.distances(ran, example.play(decoder, calls))) <= TOLERANCE
    other = copy.deepcopy(decoder)
    with torch.no_grad():
        other.get_parameter(name)[at] *= 1.01
    assert max(example.distances(ran, example.play(other, calls))) > 10 * TOLERANCE


def test_the_comparison_notices_a_lost_state(exported):
    """A token after a state of zeros is another token."""
    model = example.qwen()
    decoder, (prompt, token, *_) = example.Decoder(model), example.inputs(model)
    run = example.load(exported[0])
    _, conv, state, *kv = run(*prompt)
    want = decoder(*token, conv, state, *kv)[0]
    assert example.distances([run(*token, conv, state, *kv)[0]], [want])[0] <= TOLERANCE
    assert example.distances([run(*token, conv, state * 0, *kv)[0]], [want])[0] > 1e-3


def test_products_equal_to_the_bit(tmp_path):
    """With whole numbers no order of a sum rounds: the parts' products exactly."""
    from executorch.exir import to_edge

    torch.manual_seed(0)
    rows = {"q_proj": 48, "k_proj": 16, "v_proj": 16}
    parts = {name: torch.nn.Linear(64, n) for name, n in rows.items()}
    for tensor in (t for part in parts.values() for t in part.parameters()):
        tensor.data = torch.randint(-99, 99, tensor.shape).float()
    fused, x = FusedLinear.from_parts(parts), torch.randint(-99, 99, (2, 3, 64)).float()
    path = tmp_path / "linear.pte"
    program = to_edge(torch.export.export(fused, (x,), strict=True)).to_executorch()
    path.write_bytes(program.buffer)
    from executorch.runtime import Runtime

    (y,) = Runtime.get().load_program(path).load_method("forward").execute([x])
    for ours, part in zip(fused.split(y), parts.values(), strict=True):
        assert torch.equal(ours, part(x))
