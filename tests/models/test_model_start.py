"""What a freshly built model starts with."""

import pytest
import torch

from titans.models import TitansForCausalLM, titans_tiny


@pytest.mark.parametrize("gate", ["sigmoid", "write"])
@pytest.mark.parametrize(("forget", "rates"), [("start", [0.1**0.75 * 0.002**0.25, 0.1**0.25 * 0.002**0.75]),
                                               ("zero", [1e-4, 1e-4])])  # fmt: skip
def test_gates_start_where_they_should(gate, forget, rates):
    """Hugging Face's initialisation must not put the gates back to one half."""
    model = TitansForCausalLM(titans_tiny("lmm", num_hidden_layers=1, memory_gate=gate, memory_forget=forget))
    memory = model.model.layers[0].memory
    info = memory(torch.randn(2, 5, 128), return_info=True)[2]
    g = 0.5 if gate == "sigmoid" else 0.75
    alpha = torch.tensor(rates) * (1.0 if gate == "sigmoid" else g)
    for name, expected in (("lr", memory.max_lr * g), ("momentum", 0.5), ("forget", alpha)):
        torch.testing.assert_close(info[name], torch.as_tensor(expected).expand(2, 5, 2), rtol=1e-3, atol=0)
