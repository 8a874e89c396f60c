"""Packed INT8 decoding: near the exact numbers, faster, and out of the way elsewhere."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from fuseweights.nn import cpu_int8  # noqa: E402
from fuseweights.nn.cpu_int8 import Int8Linear, pack_model, quantize, unpack_model  # noqa: E402

KERNELS = [name for name in cpu_int8.measure(256, 64, repeats=1) if name]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch) -> str:
    monkeypatch.setattr(cpu_int8, "best", lambda: request.param)
    return request.param


def model(bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(512, 1024, bias=bias), nn.SiLU(), nn.Linear(1024, 512, bias=bias)
    return nn.Sequential(*layers).bfloat16().eval()


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.skipif(not KERNELS, reason="no INT8 kernel here")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@torch.no_grad()
def test_near_the_exact_numbers(kernel: str, tokens: int, bias: bool) -> None:
    packed = model(bias)
    plain = copy.deepcopy(packed)
    state = {name: t.clone() for name, t in packed.state_dict().items()}
    note = pack_model(packed)
    assert "numbers change" in note and kernel in note and note.startswith("2 layers")
    x = torch.randn(1, tokens, 512).bfloat16()
    x[:, 0] *= 100  # each token has a scale of its own
    got, want = packed(x), plain(x)
    assert got.dtype == torch.bfloat16 and got.shape == want.shape
    exact = plain.double()(x.double())
    for token in range(tokens):
        assert error(got[:, token], exact[:, token]) < 0.02
    after = packed.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[n], state[n]) for n in state)


@pytest.mark.skipif(not KERNELS, reason="no INT8 kernel here")
def test_elsewhere_it_is_the_plain_layer(kernel: str) -> None:
    packed = model()
    plain = copy.deepcopy(packed)
    pack_model(packed)
    x = torch.randn(1, 2, 512).bfloat16()
    with torch.no_grad():
        many = torch.randn(5, 512).bfloat16()
        assert torch.equal(packed(many), plain(many))
        empty = many[:0]
        assert packed(empty).shape == (0, 512)
        assert not torch.equal(packed(x), plain(x)), "INT8 was used"
        packed.float(), plain.float()
        assert torch.equal(packed(x.float()), plain(x.float()))
        packed.bfloat16(), plain.bfloat16()
        torch._dynamo.reset()
        compiled = torch.compile(packed, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), plain(x))
    assert torch.equal(packed(x), plain(x)), "gradients go through the plain layer"
    packed(x).sum().backward()
    assert packed[0].weight.grad is not None


@pytest.mark.skipif(not KERNELS, reason="no INT8 kernel here")
@torch.no_grad()
def test_copies_changes_and_the_way_back(kernel: str) -> None:
    packed = model()
    plain = copy.deepcopy(packed)
    pack_model(packed)
    x = torch.randn(1, 512).bfloat16()
    got = packed(x)
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(twin(x), got)
    pack_model(packed)
    assert torch.equal(packed(x), got)
    packed[0].weight *= 2
    plain[0].weight *= 2
    assert error(packed(x), plain(x)) < 0.03, "packed anew when the weights have changed"
    unpack_model(packed)
    assert type(packed[0]) is nn.Linear and torch.equal(packed(x), plain(x))
    assert not {"packed", "plain"} & packed[0].__dict__.keys()


def test_integers_of_a_checkpoint_come_back() -> None:
    rows = torch.randint(-128, 128, (64, 96), dtype=torch.int8)
    scale = (torch.rand(64, 1) / 100).bfloat16()
    weight = (rows.float() * scale.float()).bfloat16()
    again, same = quantize(weight, scale)
    assert torch.equal(again, rows) and torch.equal(same, scale.float().view(-1))


def test_only_large_plain_bfloat16_layers(monkeypatch) -> None:
    monkeypatch.setattr(cpu_int8, "best", lambda: KERNELS[0] if KERNELS else None)
    if not KERNELS:
        return
    layers = nn.ModuleList([nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(16, 16)])
    layers[1:].bfloat16()
    pack_model(layers)
    assert [type(layer) is Int8Linear for layer in layers] == [False, True, False]


def test_a_machine_where_nothing_is_faster(monkeypatch) -> None:
    monkeypatch.setattr(cpu_int8, "best", lambda: None)
    plain = model()
    assert "nothing was packed" in pack_model(plain)
    assert type(plain[0]) is nn.Linear


def test_int8_checkpoints(tmp_path) -> None:
    """compressed-tensors INT8, a scale a row: its own integers, near what transformers computes."""
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    import hf_formats

    if not KERNELS:
        pytest.skip("no INT8 kernel here")
    source = hf_formats.save("ct_int8_channel", tmp_path / "source")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    ids = torch.randint(3, 30, (1, 1))
    with torch.no_grad():
        want = loaded(ids).logits
        cpu_int8_smallest, cpu_int8.SMALLEST = cpu_int8.SMALLEST, 1
        try:
            pack_model(loaded)
        finally:
            cpu_int8.SMALLEST = cpu_int8_smallest
        packed = [m for m in loaded.modules() if isinstance(m, Int8Linear)]
        assert len(packed) == 14
        assert error(loaded(ids).logits, want) < 0.02
        unpack_model(loaded)
        assert torch.equal(loaded(ids).logits, want)
