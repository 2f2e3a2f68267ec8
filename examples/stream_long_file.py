"""Read a long document piece by piece at constant memory, put its state into a file, and go on from there.

The model is new (untrained): this shows the mechanics. The document is the source of Python's own `argparse`.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from titans.memory import State
from titans.models import TitansCache, TitansForCausalLM, titans_tiny


def main() -> None:
    torch.manual_seed(0)
    model = TitansForCausalLM(titans_tiny("mac", num_hidden_layers=2)).eval()
    document = torch.tensor([list(Path(argparse.__file__).read_bytes())])
    print(f"{document.shape[1]:,} bytes")

    cache, half = TitansCache(model.config.num_hidden_layers), document.shape[1] // 2
    with torch.no_grad():
        for piece in document[:, :half].split(2048, dim=1):
            model(piece, cache=cache, use_cache=True, logits_to_keep=1)
            print(f"read {cache.get_seq_length():>7,} bytes, state {cache.nbytes / 1024:.0f} KiB")

        with tempfile.TemporaryDirectory() as folder:  # every layer's state is a safetensors file
            for i, layer in enumerate(cache.layers):
                layer.state.save(Path(folder) / f"{i}.safetensors")
            loaded = TitansCache(model.config.num_hidden_layers)
            for i, layer in enumerate(loaded.layers):
                kind: type[State] = type(cache.layers[i].state)
                layer.update(kind.load(Path(folder) / f"{i}.safetensors"), half)

        rest = document[:, half : half + 500]
        a = model(rest, cache=cache, use_cache=True).logits
        b = model(rest, cache=loaded, use_cache=True).logits
        print("the loaded memory goes on exactly:", torch.equal(a, b))


if __name__ == "__main__":
    main()
