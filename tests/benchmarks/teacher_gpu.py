"""Images/s and memory of a full-size random-weight Marigold: needs a CUDA device and 5 GB of disk.

``PYTHONPATH=tests python tests/benchmarks/teacher_gpu.py`` prints a Markdown table for 1, 4 and 10
answers of each image; random weights cost what trained ones do. One step, float16, 768 x 576.
``... teacher_gpu.py rehearse`` takes every step of it on the CPU with a tenth of the channels and
small images: it shows that the measurement runs, its numbers mean nothing.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
from teacher_cases import options, query
from teacher_memory import GIB, SD2_UNET, SD2_VAE
from tiny_checkpoints import write_marigold

from teacher.generators import load_teacher
from teacher.label import Task

ANSWERS = (1, 4, 10)
NARROW_UNET = {"block_out_channels": (32, 64, 128, 128), "attention_head_dim": (1, 2, 4, 4)}
NARROW_VAE = {"block_out_channels": (32, 32, 64, 64)}


def write_full_size(folder: Path, *, narrow: bool = False) -> Path:
    """Marigold's layout with Stable Diffusion 2's own sizes, or a tenth of its channels."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    write_marigold(folder, kind="depth")
    torch.manual_seed(0)
    unet = SD2_UNET | (NARROW_UNET if narrow else {})
    UNet2DConditionModel(**unet).half().save_pretrained(folder / "unet")
    vae = AutoencoderKL(**SD2_VAE | (NARROW_VAE if narrow else {}), scaling_factor=0.18215)
    vae.half().save_pretrained(folder / "vae")
    text = CLIPTextConfig(vocab_size=8, hidden_size=1024, num_attention_heads=16)
    text.bos_token_id, text.eos_token_id, text.pad_token_id = 2, 3, 3
    CLIPTextModel(text).half().save_pretrained(folder / "text_encoder")
    return folder


def measure(folder: Path, *, answers: int, images: int, size: tuple[int, int], **changes) -> dict:
    """Seconds per image over ``images`` after one that is not counted; peak bytes on a GPU."""
    named = {"depth": str(folder), "normals": None, "steps": 1, "side_px": max(size)}
    teacher = load_teacher(**options("marigold", **named, seeds=list(range(answers)), **changes))
    queries = [query(f"image {i}", *size, seed=i) for i in range(images + 1)]
    on_gpu = changes.get("device") == "cuda"
    teacher.answer(queries[:1], [Task.DEPTH])
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for one in queries[1:]:  # answers come back as arrays, so the device has finished
        teacher.answer([one], [Task.DEPTH])
    seconds = (time.perf_counter() - start) / images
    return {
        "answers": answers,
        "images_per_s": 1 / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


def main(arguments: list[str]) -> None:
    """Print the table, with the device it was measured on."""
    rehearse = arguments == ["rehearse"]
    if not (rehearse or torch.cuda.is_available()):
        raise SystemExit("teacher_gpu: no CUDA device here; nothing can be measured")
    device, size = ("cpu", (48, 64)) if rehearse else ("cuda", (576, 768))
    name = "a rehearsal on the CPU" if rehearse else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}\n")
    print("| answers | images/s | peak GiB |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        written = write_full_size(Path(folder, "marigold-depth"), narrow=rehearse)
        for answers in ANSWERS:
            row = measure(
                written,
                answers=answers,
                images=1 if rehearse else 10,
                size=size,
                device=device,
                pass_size=answers,
            )
            peak = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / GIB:.2f}"
            print(f"| {answers} | {row['images_per_s']:.2f} | {peak} |")


if __name__ == "__main__":
    main(sys.argv[1:])
