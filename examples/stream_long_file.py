"""Read a long document at constant memory, put what the model remembers of it into a file, and go on from there.

The model is new (untrained): this shows the mechanics. The document is the source of Python's own `argparse`.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from titans.models import TitansCache, TitansForCausalLM, titans_tiny


def main() -> None:
    torch.manual_seed(0)
    model = TitansForCausalLM(titans_tiny("mac", num_hidden_layers=2)).eval()
    document = torch.tensor([list(Path(argparse.__file__).read_bytes())])
    print(f"{document.shape[1]:,} bytes")

    cache, read = None, 0
    for part in document[:, :-500].split(16_384, dim=1):
        cache, read = model.memorize(part, cache), read + part.shape[1]
        print(f"read {read:>7,} bytes, memory {cache.nbytes / 1024:.0f} KiB")

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "argparse.memory.safetensors"
        cache.save_pretrained(file, model)
        loaded = TitansCache.load(file, model)

    with torch.no_grad():
        a = model(document[:, -500:], cache=cache).logits
        b = model(document[:, -500:], cache=loaded).logits
    print("the loaded memory goes on exactly:", torch.equal(a, b))


if __name__ == "__main__":
    main()
