"""What a freshly built model starts with."""

import pytest
import torch

from titans.models import TitansForCausalLM, titans_tiny


@pytest.mark.parametrize("gate", ["sigmoid", "write"])
def test_gates_start_almost_without_forgetting(gate):
    """Hugging Face's initialisation must not put the gates back to one half."""
    model = TitansForCausalLM(titans_tiny("lmm", num_hidden_layers=1, memory_gate=gate))
    memory = model.model.layers[0].memory
    theta, log_eta, log_retention = memory.gates(torch.randn(2, 5, 128))
    g = 0.5 if gate == "sigmoid" else 0.75
    alpha = 1e-4 * (1.0 if gate == "sigmoid" else g)
    for got, expected in ((theta, memory.max_lr * g), (log_eta.exp(), 0.5), (-torch.expm1(log_retention), alpha)):
        torch.testing.assert_close(got, torch.full_like(got, expected), rtol=1e-3, atol=0)
