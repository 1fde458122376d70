"""Images/s and memory of a full-size random-weight Marigold: needs a CUDA device and 5 GB of disk.

``PYTHONPATH=tests python tests/benchmarks/teacher_gpu.py`` prints a Markdown table for 1, 4 and 10
answers of each image; random weights cost what trained ones do. One step, float16, 768 x 576.
"""

from __future__ import annotations

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


def write_full_size(folder: Path) -> Path:
    """Marigold's layout with Stable Diffusion 2's own sizes."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    write_marigold(folder, kind="depth")
    torch.manual_seed(0)
    UNet2DConditionModel(**SD2_UNET).half().save_pretrained(folder / "unet")
    vae = AutoencoderKL(**SD2_VAE, scaling_factor=0.18215)  # type: ignore[arg-type]
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


def main() -> None:
    """Print the table, with the device it was measured on."""
    if not torch.cuda.is_available():
        raise SystemExit("teacher_gpu: no CUDA device here; nothing can be measured")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| answers | images/s | peak GiB |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        written = write_full_size(Path(folder, "marigold-depth"))
        for answers in ANSWERS:
            row = measure(
                written,
                answers=answers,
                images=10,
                size=(576, 768),
                device="cuda",
                pass_size=answers,
            )
            print(f"| {answers} | {row['images_per_s']:.2f} | {row['peak_bytes'] / GIB:.2f} |")


if __name__ == "__main__":
    main()
