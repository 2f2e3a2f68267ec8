"""Every refusal names the argument and the value."""

import math

import pytest
import torch
from memory_cases import OPTIONS, make

from titans.memory import MemoryMLP, MemoryState, neural_memory
from titans.memory.state import save_tensors


def call(case=None, **changes):
    case = case or make()
    names = ("q", "k", "v", "lr", "log_momentum", "log_retention")
    arguments = dict(zip(names, case.inputs, strict=True))
    arguments |= {"weights": case.weights, "network": case.network, "chunk_size": case.chunk_size, **changes}
    return neural_memory(**arguments)


CASE = make()
BAD = {
    "q of integers": ({"q": torch.zeros(2, 13, 2, 4, dtype=torch.long)}, "q must be floating point"),
    "q of three axes": ({"q": CASE.q[:, :, 0]}, r"q must be .*\[2, 13, 4\]"),
    "k shape": ({"k": CASE.k[:, 1:]}, r"k must be like q.*\[2, 12, 2, 4\]"),
    "v dtype": ({"v": CASE.v.float()}, r"v must be like q.*float32"),
    "lr": ({"lr": CASE.lr[..., :1]}, r"lr must be \[B, T, H\].*\[2, 13, 1\]"),
    "log_momentum": ({"log_momentum": CASE.lr[:1]}, r"log_momentum must be .*\[1, 13, 2\]"),
    "log_retention": ({"log_retention": CASE.lr.unsqueeze(-1)}, r"log_retention must be .*\[2, 13, 2, 1\]"),
    "too few maps": ({"weights": CASE.weights[:1]}, "weights must be linear maps"),
    "wrong map": ({"weights": CASE.weights[::-1]}, "weights must be linear maps"),
    "one of gain and bias": ({"weights": CASE.weights[:3]}, "gain and bias"),
    "gain without norm": ({"network": MemoryMLP(norm=False)}, "norm=False"),
    "chunk_size": ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
    "chunk_size of a fraction": ({"chunk_size": 2.5}, "chunk_size must be at least 1, got 2.5; use an integer"),
    "backend": ({"backend": "cuda"}, "backend must be one of .*got 'cuda'"),
    "mask": ({"mask": torch.ones(2, 12)}, r"mask must be .*\[2, 13\].*\[2, 12\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name):
    changes, message = BAD[name]
    call()
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_state_of_another_chunk_size():
    state = make(C=8).run()[1]
    with pytest.raises(ValueError, match=r"state was made with chunk_size=8, got chunk_size=4"):
        call(state=state)


@pytest.mark.parametrize("other", [{"B": 3}, {"H": 1}, {"D": 8}, {"network": OPTIONS["depth1"]}])
def test_state_of_another_shape(other):
    state = make(**other).run()[1]
    with pytest.raises(ValueError, match=r"state must hold as \w+(\.\d)? .*, got"):
        call(state=state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth must be 1, 2, 3 or 4, got 0"),
        ({"depth": 5}, "got 5"),
        ({"depth": "2"}, "depth must be 1, 2, 3 or 4, got '2'"),
        ({"expansion": 0}, "expansion must be positive"),
        ({"expansion": math.nan}, "expansion must be positive, got nan"),
        ({"expansion": math.inf}, "expansion must be positive, got inf"),
        ({"norm_eps": "small"}, "norm_eps must be positive, got 'small'"),
        ({"norm": 2.5}, "norm must be True or False, got 2.5"),
        ({"activation": []}, r"activation must be one of .*got \[\]"),
        ({"activation": "tanh"}, "activation must be one of .*'tanh'"),
    ],
)
def test_bad_network(changes, message):
    with pytest.raises(ValueError, match=message):
        MemoryMLP(**changes)


CHANGES = {"shape": lambda t: t[..., :-1] if t.dim() > 1 else t[:-1], "dtype": lambda t: t.half()}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["inputs.1", "signals.0", "pending", "transition", "position", "maps.0"])
def test_state_of_which_one_tensor_is_another(name, change, tmp_path):
    """As a file may hold it."""
    tensors = make().run()[1].tensors()
    tensors[name] = CHANGES[change](tensors[name])
    save_tensors(tensors, tmp_path / "a.state", {"titans": "MemoryState"})
    state = MemoryState.load(tmp_path / "a.state")
    with pytest.raises(ValueError, match=f"state must hold as {name} torch.* got torch"):
        call(state=state)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        MemoryState.load(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("damage", ["empty", "truncated", "header", "text"])
def test_broken_file(damage, tmp_path):
    path = tmp_path / "memory.safetensors"
    make().run()[1].save(path)
    whole = path.read_bytes()
    broken = {"empty": b"", "truncated": whole[:-10], "header": b"\xff" * 8 + whole[8:], "text": b"not a state"}
    path.write_bytes(broken[damage])
    with pytest.raises(ValueError, match=r"memory\.safetensors is truncated or no safetensors file"):
        MemoryState.load(path)


def test_file_of_something_else(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors holds 'no titans state', expected 'MemoryState'"):
        MemoryState.load(tmp_path / "other.safetensors")


def test_a_file_without_a_tensor_is_named(tmp_path):
    tensors = make().run()[1].tensors()
    del tensors["maps.1"]
    save_tensors(tensors, tmp_path / "a.state", {"titans": "MemoryState"})
    with pytest.raises(ValueError, match=r"a\.state is damaged: MemoryState needs the tensor 'maps.1'"):
        MemoryState.load(tmp_path / "a.state")


@pytest.mark.parametrize("name", ["pending", "transition", "position", "inputs.1", "maps.0", "maps.1"])
def test_missing_tensor(name):
    tensors = make().run()[1].tensors()
    del tensors[name]
    with pytest.raises(ValueError, match=f"needs the tensor '{name}'"):
        MemoryState.from_tensors(tensors)
