"""Write the weights of the English teacher, all-MiniLM-L6-v2 (Apache-2.0), in eight bits a row: it travels to another machine.

python eval/pocket/mini/teacher.py --output build/mini/minilm
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from embedder import teacher_folder


def main() -> None:
    """Write `minilm.npz` and `minilm-tokenizer.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    stored = {}
    for name, value in load_file(teacher_folder() / "model.safetensors").items():
        if "pooler" in name or "position_ids" in name:
            continue
        if value.ndim == 2 and "position" not in name and "token_type" not in name:
            scale = np.abs(value).max(1) / 127 + 1e-12
            stored[f"{name}.scale"] = scale.astype(np.float32)
            stored[name] = np.round(value / scale[:, None]).astype(np.int8)
        else:
            stored[name] = value.astype(np.float16)
    np.savez(options.output / "minilm.npz", **stored)
    shutil.copy(teacher_folder() / "tokenizer.json", options.output / "minilm-tokenizer.json")


if __name__ == "__main__":
    main()
