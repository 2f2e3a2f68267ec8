"""Forecasters over a stream: cuts, the blocks by hand, leaks, constant size, files, errors."""

import pytest
import torch
from test_prediction import build, forms, series
from tolerances import assert_equal

from titans.models import TitansCache, TitansStream

LENGTH = 30  # of the look-back of these models, and of a block


@forms
@torch.no_grad()
def test_rows_cut_anywhere_give_the_same_stream(variant, mixing):
    model, x = build(variant, mixing), series(rows=130)
    whole = model.update(x)
    for cuts in ([130], [1, 29, 100], [59, 1, 0, 40, 30], [17] * 7 + [11]):
        stream = None
        for part in x.split(cuts, 1):
            stream = model.update(part, stream)
        assert torch.equal(stream.rows, whole.rows)
        for mine, theirs in zip(stream.cache.layers, whole.cache.layers, strict=True):
            expected = theirs.state.tensors()
            assert all(torch.equal(t, expected[name]) for name, t in mine.state.tensors().items())


@forms
@torch.no_grad()
def test_a_forecast_is_that_of_the_look_back_after_all_blocks_before_it(variant, mixing):
    """The blocks read one by one with ``forward``; each series of the batch as if it were alone."""
    model, x = build(variant, mixing, quantiles=[0.2, 0.5]), series(rows=125)
    for rows, blocks in ((30, 0), (59, 0), (60, 1), (89, 1), (125, 3)):
        out = model.forecast(model.update(x[:, :rows]))
        for i in range(2):
            cache = TitansCache(2)
            for block in x[i : i + 1, : blocks * LENGTH].split(LENGTH, 1) if blocks else ():
                model(block, cache=cache)
            expected = model(x[i : i + 1, rows - LENGTH : rows], cache=cache)
            assert_equal(out.quantile_outputs[i : i + 1], expected.quantile_outputs)
        if not blocks:
            assert_equal(out.prediction_outputs, model(x[:, rows - LENGTH : rows]).prediction_outputs)


@forms
@torch.no_grad()
def test_the_past_counts_by_blocks_and_the_future_never(variant, mixing):
    model, x = build(variant, mixing), series(rows=130)
    stream = model.update(x[:, :100])  # memory of rows 0 to 59, look-back from row 70 on
    before = model.forecast(stream).prediction_outputs
    for _ in range(2):
        model.update(series(rows=70), stream)  # leaves it as it is
        assert torch.equal(model.forecast(stream).prediction_outputs, before)
    for row, counts in ((0, True), (59, True), (60, False), (69, False), (70, True)):
        changed = x[:, :100].clone()
        changed[0, row, 1] += 2
        moved = (model.forecast(model.update(changed)).prediction_outputs - before).abs().amax(1) > 1e-12
        assert moved.tolist() == [[counts and mixing, counts, counts and mixing], [False] * 3]


@torch.no_grad()
def test_several_windows_after_the_same_blocks():
    model, x = build(), series(rows=70)
    stream = model.update(x[:, :60])
    windows = torch.cat([x[:, begin : begin + LENGTH] for begin in (30, 33, 40)])
    together = model(windows, cache=stream.memory(3)).prediction_outputs
    for i, begin in enumerate((30, 33, 40)):
        alone = model(x[:, begin : begin + LENGTH], cache=stream.cache.copy()).prediction_outputs
        assert_equal(together[2 * i : 2 * i + 2], alone)


def test_rows_of_a_batch_begin_anew_where_they_say():
    model, x = build().train(), series(rows=60)
    cache = TitansCache(2)
    model(x[:, :LENGTH], cache=cache)
    begins = torch.tensor([False, True])
    both = model(x[:, LENGTH:], series(rows=7), cache=cache.copy().detach_(), begins=begins)
    both.loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    carried, anew = model(x[:, LENGTH:], cache=cache.copy()), model(x[:, LENGTH:])
    assert_equal(both.prediction_outputs[0], carried.prediction_outputs[0])
    assert_equal(both.prediction_outputs[1], anew.prediction_outputs[1])


def test_constant_size():
    model = build(num_hidden_layers=1, hidden_size=4, context_length=6, patch_length=3, num_input_channels=1).float()
    x = torch.randn(1, 6 * 300, 1, generator=torch.Generator().manual_seed(0))
    ten = model.update(x[:, :60])
    longer = model.update(x[:, 60:], ten)
    assert longer.nbytes == ten.nbytes == model.update(x[:, :6]).nbytes
    assert longer.rows.untyped_storage().nbytes() == longer.rows.nbytes
    assert model.forecast(longer).prediction_outputs.isfinite().all()
    assert not any(t.requires_grad for layer in longer.cache.layers for t in layer.state.tensors().values())


@pytest.mark.parametrize("rows", [0, 7, 100])
def test_a_stream_that_is_loaded_goes_on_exactly(tmp_path, rows):
    model, x = build().float(), series(rows=200).float()
    stream = model.update(x[:, :rows])
    stream.save_pretrained(tmp_path / "memory", model)
    loaded = TitansStream.load(tmp_path / "memory", model)
    assert torch.equal(loaded.rows, stream.rows)
    forecasts = [model.forecast(model.update(x[:, rows:], s)).prediction_outputs for s in (stream, loaded)]
    assert torch.equal(*forecasts)


def test_files_that_are_no_stream_of_the_model(tmp_path):
    model = build().float()
    model.update(series()).save_pretrained(tmp_path / "stream", model)
    with pytest.raises(ValueError, match="other weights"):
        TitansStream.load(tmp_path / "stream", build(prediction_length=8).float())
    model.update(series()).cache.save_pretrained(tmp_path / "cache", model)
    with pytest.raises(ValueError, match="holds a memory without rows; give what save_pretrained of a stream wrote"):
        TitansStream.load(tmp_path / "cache", model)


def test_bad_rows_name_the_mend():
    model = build()
    stream = model.update(series(rows=29))
    with pytest.raises(ValueError, match="the stream holds 29 rows, context_length=30; update it with 1 more first"):
        model.forecast(stream)
    hole = series()
    hole[1, 4, 2] = float("nan")
    with pytest.raises(ValueError, match="new_rows holds nan, first in window 1, row 4, channel 2; fill gaps"):
        model.update(hole, stream)
    for x in (series(channels=2), series()[0]):
        with pytest.raises(ValueError, match=r"new_rows has the shape .*\[batch, rows, 3\]"):
            model.update(x, stream)
    with pytest.raises(ValueError, match="new_rows holds 1 series, the stream 2; give rows of all of them"):
        model.update(series(batch=1), stream)
    assert model.forecast(model.update(series(rows=1), stream)).prediction_outputs.isfinite().all()
