"""MemoryState: the caller's own, batch operations, size, files."""

import pytest
import torch
from memory_cases import OPTIONS, assert_equal, in_pieces, make, results

from titans.memory import MemoryState


def state_of(case, T=6):
    return case.tokens(0, T).run()[1]


@pytest.mark.parametrize("rows", [[2, 0], [1, 1, 0, 2], torch.tensor([0])])
def test_select_reorders_and_repeats_rows(rows):
    case = make(B=3)
    chosen = state_of(case).select(rows)
    index = torch.as_tensor(rows)
    rest = case.tokens(6).on(*(x[:, 6:][index] for x in case.inputs))
    whole = case.on(*(x[index] for x in case.inputs)).run()
    got = rest.run(state=chosen)
    assert_equal(got[0], whole[0][:, 6:])
    assert_equal(got[1].tensors(), whole[1].tensors())


def test_repeat_puts_copies_side_by_side():
    state = state_of(make())
    assert_equal(state.repeat(3).tensors(), state.select([0, 0, 0, 1, 1, 1]).tensors())


def test_detach_stops_gradients_and_keeps_numbers():
    case = make().leaves()
    state = state_of(case)
    cut = state.detach()
    assert state.weights[0].requires_grad
    assert not any(x.requires_grad for x in cut.tensors().values())
    assert_equal(cut.tensors(), state.tensors(), 0.0)


def test_to_changes_floating_point_only():
    state = state_of(make())
    low = state.to(dtype=torch.float32)
    assert {x.dtype for n, x in low.tensors().items() if n != "position"} == {torch.float32}
    assert low.position.dtype == torch.long
    assert_equal(low.to("cpu", torch.float64).tensors(), state.tensors(), 1e-6)
    assert {x.device.type for x in state.to("meta").tensors().values()} == {"meta"}


@pytest.mark.parametrize("network", OPTIONS)
def test_nbytes_is_constant(network):
    case = make(OPTIONS[network], T=40)
    sizes = {state_of(case, T).nbytes for T in (0, 1, 4, 6, 40)}
    assert len(sizes) == 1
    tensors = state_of(case).tensors().values()
    assert sizes == {sum(x.numel() * x.element_size() for x in tensors)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_keeps_float32_memory(dtype):
    """Weights, momentum, gates of the state; what is read comes back in the dtype of the queries."""
    out, state, info = make(dtype=dtype).run()
    assert out.dtype == dtype
    assert {x.dtype for n, x in state.tensors().items() if n != "position"} == {torch.float32}
    assert info.loss.dtype == info.surprise.dtype == torch.float32


def test_autocast_changes_nothing():
    """Precision follows the arguments, never a context."""
    case = make(dtype=torch.float32, T=21)
    for info in (True, False):
        plain = results(*case.run(info=info))
        with torch.autocast("cpu", torch.bfloat16):
            inside = results(*case.run(info=info))
        assert all(torch.equal(inside[n], x) and inside[n].dtype == x.dtype for n, x in plain.items())


def test_save_and_load(tmp_path):
    state = state_of(make())
    state.save(tmp_path / "memory.safetensors")
    loaded = MemoryState.load(tmp_path / "memory.safetensors")
    assert_equal(loaded.tensors(), state.tensors(), 0.0)
    assert loaded.chunk_size == 4
    assert loaded.read == state.read == 6
    assert loaded.conv is None
    assert [p.name for p in tmp_path.iterdir()] == ["memory.safetensors"], "nothing but the file is left behind"


def test_a_state_is_not_changed_by_use():
    """Two continuations of the same state do not see each other."""
    case = make(T=13)
    state = state_of(case)
    other = case.tokens(6).on(v=-case.v[:, 6:])
    first = results(*case.tokens(6).run(state=state))
    other.run(state=state)
    assert_equal(results(*case.tokens(6).run(state=state)), first, 0.0)


def test_position_counts_real_tokens():
    mask = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0]])
    assert make(T=5).run(mask=mask)[1].position.tolist() == [3, 0]


def test_own_loss_falls_on_a_repeating_sequence():
    """Test contract 7: the memory predicts what it has read before ever better, for every head."""
    case = make(OPTIONS["default"], B=1, T=16, D=16, C=8)
    rounds = 12
    again = case.on(*(x.repeat(1, rounds, *[1] * (x.dim() - 2)) for x in case.inputs))
    again = again.on(log_momentum=torch.full_like(again.lr, -0.7), log_retention=torch.zeros_like(again.lr))
    loss = again.run()[2].loss.unflatten(1, (rounds, 16)).mean(2)[0]
    assert (loss[-1] < 0.5 * loss[0]).all()
    assert (loss[1:] <= loss[:-1] * 1.02).all()


def test_written_is_read_back_across_calls():
    """A key's value comes back from the state alone, many calls later."""
    case = make(OPTIONS["plain depth1"], B=1, T=1, H=1, C=1)
    case = case.on(q=case.k, lr=torch.full_like(case.lr, 0.5), log_retention=torch.zeros_like(case.lr))
    _, state, _ = case.run()
    silent = case.on(lr=torch.zeros_like(case.lr), log_momentum=torch.full_like(case.lr, -torch.inf))
    for _ in range(5):
        out, state, _ = silent.run(state=state)
    assert_equal(out, case.v)


def test_pieces_do_not_share_storage_with_the_inputs():
    """Overwriting what was passed does not reach into a state that was returned."""
    case = make(T=13)
    expected = in_pieces(case, [6])[0]
    prefix = case.on(*(x[:, :6].clone() for x in case.inputs))
    _, state, _ = prefix.run()
    for x in prefix.inputs:
        x.fill_(torch.nan)
    assert_equal(case.tokens(6).run(state=state)[0], expected[:, 6:])
