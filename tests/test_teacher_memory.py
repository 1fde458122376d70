"""The VRAM table's arithmetic: known parameter counts, and a chain whose peak is known by hand."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import teacher_gpu
import teacher_memory


def test_parameter_counts_are_the_published_ones():
    """SD 2 U-Net 865.91 M plus 4 more input channels (3 x 3 x 4 x 320); FLUX.1 11.90 B."""
    count = teacher_memory.weights()
    assert count["Marigold U-Net"] == 865_910_724 + 9 * 4 * 320
    assert count["SD VAE"] == 83_653_863
    assert count["FLUX.1 transformer"] == 11_901_408_320


def test_peak_of_a_chain_by_hand():
    """64 x 64 floats through width 256: input 16 KiB, hidden and its ReLU 64 KiB each."""

    def make():
        return torch.nn.Sequential(
            torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8)
        )

    peak = teacher_memory.pass_bytes(make, lambda net: net(torch.zeros(64, 64)), torch.float32)
    assert peak == (16 + 64 + 64) * 1024


def test_the_gpu_measurement_is_rehearsed_on_the_cpu(capsys):
    teacher_gpu.main(["rehearse"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.endswith("| – |")]
    assert [row.split(" | ")[0] for row in rows] == ["| 1", "| 4", "| 10"]
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no CUDA device here"):
            teacher_gpu.main([])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_full_size_marigold_stays_within_the_table_on_a_gpu(tmp_path):
    folder = teacher_gpu.write_full_size(tmp_path / "full")
    row = teacher_gpu.measure(
        folder, answers=4, images=2, size=(576, 768), device="cuda", pass_size=4
    )
    assert row["peak_bytes"] < 1.5 * 4.3 * teacher_memory.GIB  # docs/results.md: 4.30 GiB computed
