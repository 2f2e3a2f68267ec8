"""Put NeuralMemory into a model of your own, and look at what it does.

Which of eight symbols stood first, 300 tokens ago? There is no attention: the memory has to hold it.
"""

import torch
from torch import nn

from titans import NeuralMemory

SYMBOLS, LENGTH = 8, 300


class Recaller(nn.Module):
    """Embedding, one memory layer, a linear head on the last token."""

    def __init__(self, dim: int = 32):
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS + 2, dim)
        self.norm = nn.RMSNorm(dim)
        self.memory = NeuralMemory(dim, heads=1, chunk_size=50, gate="write")
        self.head = nn.Linear(dim, SYMBOLS)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y, _state = self.memory(self.norm(self.embed(ids)))
        return self.head(y[:, -1])


def batch(size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symbol, then noise (id 8), then a question mark (id 9)."""
    answer = torch.randint(SYMBOLS, (size,))
    ids = torch.full((size, length), SYMBOLS)
    ids[:, 0], ids[:, -1] = answer, SYMBOLS + 1
    return ids, answer


def main() -> None:
    torch.manual_seed(0)
    model = Recaller()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        ids, answer = batch(16, 50)
        loss = nn.functional.cross_entropy(model(ids), answer)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    with torch.no_grad():
        ids, answer = batch(64, LENGTH)
        accuracy = (model(ids).argmax(-1) == answer).float().mean().item()
        print(f"trained on 50 tokens, asked after {LENGTH}: accuracy {accuracy:.2f}")
        _, _, info = model.memory(model.norm(model.embed(ids[:1])), return_info=True)
        print("surprise at tokens 0, 1, 2, last:", [round(info["surprise"][0, t, 0].item(), 2) for t in (0, 1, 2, -1)])
        print("step size there:                 ", [round(info["lr"][0, t, 0].item(), 3) for t in (0, 1, 2, -1)])


if __name__ == "__main__":
    main()
