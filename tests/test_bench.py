"""The benchmark's numbers and its three ways to show them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import gguf_models  # noqa: E402
import hf_models  # noqa: E402

import fuseweights  # noqa: E402
from fuseweights import UsageError  # noqa: E402
from fuseweights.nn.bench import bench  # noqa: E402

QUICK = {"prompt": 8, "new_tokens": 3, "repeats": 1}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return hf_models.save("qwen3", tmp_path_factory.mktemp("bench") / "source")


def test_split_fused_and_config_alone(source: Path) -> None:
    fused = source.parent / "fused"
    fuseweights.convert(source, fused)
    results = [bench(source, **QUICK), bench(fused, **QUICK), bench(model_config=source, **QUICK)]
    for result in results:
        assert [row.variant for row in result.rows] == ["unfused", "fused"]
        assert result.fused == 4 and result.same_tokens and result.note is None
        before, after = result.rows
        # q, k, v and gate, up: three products less a layer
        assert before.ops - after.ops == 3 * hf_models.LAYERS
        assert all(row.decode_ms > 0 and row.kernels is None for row in result.rows)
    assert results[0].rows[0].ops == results[1].rows[0].ops == results[2].rows[0].ops


def test_json_table_and_int8(source: Path) -> None:
    result = bench(source, cpu_int8=True, batch=2, **QUICK)
    assert [row.variant for row in result.rows] == ["unfused", "fused", "fused, int8"]
    data = json.loads(result.json())
    assert data["schema"] == 1 and data["note"] and len(data["rows"]) == 3
    assert data["rows"][0]["decode_tokens_per_second"] == pytest.approx(
        2e3 / data["rows"][0]["decode_ms"]
    )
    assert result.table().row_count == 3


def test_the_decoder_takes_part(source: Path, tmp_path: Path) -> None:
    result = bench(source, decoder=True, batch=2, **QUICK)
    assert [row.variant for row in result.rows] == ["unfused", "fused", "decoder"]
    assert result.same_tokens and result.note is None
    other = hf_models.save("olmo2", tmp_path / "other")
    result = bench(other, decoder=True, **QUICK)
    assert [row.variant for row in result.rows] == ["unfused", "fused"]
    assert "decoder: Decoder does not know the layers of 'olmo2'" in result.note


def test_a_gguf_file(tmp_path: Path) -> None:
    path = gguf_models.build("qwen3", tmp_path / "model.gguf", "Q4_K_M")
    result = bench(path, decoder=True, dtype="float32", **QUICK)
    assert [row.variant for row in result.rows] == ["fused", "decoder"]
    assert result.fused >= 2 and result.note is None


def test_plot(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bench(source, **QUICK).plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_plot_without_matplotlib(source: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match="matplotlib"):
        bench(source, **QUICK).plot(tmp_path / "plot.png")


def test_one_source_only(source: Path) -> None:
    with pytest.raises(UsageError, match="one of them"):
        bench()
    with pytest.raises(UsageError, match="one of them"):
        bench(source, model_config=source)
