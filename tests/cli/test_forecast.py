"""titans forecast: files that are wrong, mends and the numbers after them, stamps, the back-test, runs end to end."""

import gzip
import importlib
import os
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from titans.cli import main
from titans.forecasting import Table, forecast, read_table
from titans.forecasting.backtest import backtest, calibrated, naive_forecast
from titans.forecasting.forecast import Plan
from titans.training.models import load_run
from titans.training.run import train

NAN = np.nan
HOURS = [f"2024-01-01 {hour:02}:00" for hour in range(24)]


def csv(*rows, names="date,a"):
    return "\n".join([names, *rows]) + "\n"


def hourly(*values, names="date,a"):
    """Rows of one cell each, an hour apart."""
    return csv(*(f"{stamp},{value}" for stamp, value in zip(HOURS, values, strict=False)), names=names)


def dated(start, periods, freq, **columns):
    return pd.DataFrame(columns or {"a": np.arange(periods)}, index=pd.date_range(start, periods=periods, freq=freq))


def waves(rows=200, seed=0):
    """Two noisy waves of 24 hours, and a constant."""
    time = np.arange(rows)
    noise = np.random.default_rng(seed).standard_normal((2, rows))
    return dated("2024-01-01", rows, "h", a=np.sin(time * np.pi / 12) + 0.1 * noise[0],
                 b=1000 + 50 * np.cos(time * np.pi / 12) + 5 * noise[1], k=7.5)  # fmt: skip


@pytest.fixture
def read(tmp_path):
    def read(text, **choices):
        (tmp_path / "file.csv").write_text(text)
        return read_table(tmp_path / "file.csv", **choices)

    return read


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; give a CSV file"),
        ("\n", "is empty; give a CSV file with a line of names"),
        (csv(), "nothing below it"),
        (hourly(1), r"file\.csv has one row, 2024-01-01 00:00:00; give it more"),
        (csv("1,2", "3,4", names="a,b"), r"no column of dates, but 'a', 'b'; add one.* or name it in time_column"),
        (csv("Mon,2", "Tue,4", names="day,b"), "no column of dates, but 'day', 'b'"),
        (csv("2016,2", "2017,4", names="year,b"), "no column of dates, but 'year', 'b'"),
        (hourly(1, 2, "three", 4), r"file\.csv, line 4, column 'a' holds 'three', no finite number; correct it"),
        (hourly(1, 2, 3, "inf"), r"line 5, column 'a' holds 'inf'"),
        (hourly(1, 2, "3,5"), r"line 4 has 3 cells, its first line 2"),
        (hourly("x", "y", "z"), "no column of numbers beside its dates; add one"),
        (hourly(1, "", "", "", 5), r"column 'a' has values in 2 of 5 rows, too few.*remove it, or choose other"),
        (hourly("", ""), "column 'a' has values in 0 of 2 rows"),
        (csv("2024-01-01,1", "2024-01-02,2", "soon,3"), r"line 4, column 'date' holds 'soon', no date like the others"),
        (csv("2024-01-01,1", "2024-01-02,2", ",3"), r"line 4, column 'date' holds '', no date"),
        (csv("2024-01-01,1", "2024-01-02,2", names="2023-12-31,0"), "begins with the date '2023-12-31'; give it"),
        (hourly("1,2", "3,4", names="date,a,a"), "two columns named 'a'; rename one of them"),
        (csv("01/02/2024,1", "02/02/2024,2"), "'01/02/2024', which may be day or month first.*write them"),
        (csv("2024-01-01,1", "2024-01-01,2", "2024-01-02,3", "2024-01-02,4"),
         r"has 4 of 4 rows with a stamp that another has too, such as 2024-01-01.*a column of its own"),
        (csv(*(f"{HOURS[i]},1" for i in (0, 1, 2, 11))),
         r"has 4 rows of the 12 that its usual step, 1 hour, makes from 2024-01-01 00:00:00 to 2024-01-01 11.*most"),
        (hourly(*range(5)) + "2024-01-01 04:10,1\n2024-01-01 05:00,2\n",
         r"usual step is 1 hour, but from 2024-01-01 04:00:00 to 2024-01-01 04:10:00 it is 10 minutes"),
        (hourly(*range(24)) + "".join(f"2024-01-{day:02},1\n" for day in range(2, 14)),
         r"usual step is 1 hour, but from 2024-01-02 00:00:00 to 2024-01-03 00:00:00 it is 1 day; "),
    ],
)  # fmt: skip
def test_bad_files_name_the_mend(text, message, read):
    with pytest.raises(ValueError, match=message):
        read(text)


def test_bad_choices_name_the_mend(read, tmp_path):
    text = hourly("1,x", "2,y", names="date,OT,word")
    for choices, message in (
        ({"targets": ["OTT"]}, "target='OTT' is not valid; use 'OT'"),
        ({"targets": ["date"]}, "target='date' is not valid"),
        ({"targets": ["word"]}, "line 2, column 'word' holds 'x', no finite number"),
        ({"time_column": "dat"}, "time_column='dat' is not valid; use 'date'"),
        ({"time_column": "word"}, "line 2, column 'word' holds 'x', no date"),
    ):
        with pytest.raises(ValueError, match=message):
            read(text, **choices)
    with pytest.raises(FileNotFoundError, match=r"data='nowhere\.csv' does not exist; give a CSV file"):
        read_table("nowhere.csv")
    with pytest.raises(ValueError, match="the table is empty"):
        read_table(pd.DataFrame({"date": [], "a": []}))
    with pytest.raises(ValueError, match="row 1, column 'a' holds 'x'"):
        read_table(pd.DataFrame({"date": ["2024-01-01", "2024-01-02", "2024-01-03"], "a": [1, "x", 2]}))


def test_a_clean_file_is_read_as_it_is(read):
    table = read(hourly(1.25, -2e3, 3))
    assert table.values["a"].tolist() == [1.25, -2000, 3]
    assert table.notes == []
    assert table.summary == "3 rows of 1 column, 2024-01-01 00:00:00 to 2024-01-01 02:00:00, 1 hour apart; " \
                            "a season of 24 rows"  # fmt: skip


def test_unsorted_rows_are_sorted(read):
    table = read(csv(f"{HOURS[2]},3", f"{HOURS[0]},1", f"{HOURS[1]},2"))
    assert table.values["a"].tolist() == [1, 2, 3]
    assert table.notes == ["the stamps were not in order; rows sorted"]


def test_rows_of_one_stamp_become_their_mean(read):
    """Of what is known."""
    cells = ["1,5", "2,6", "3,7", "4,8"]
    table = read(hourly(*cells, names="date,a,b") + f"{HOURS[1]},4,\n")
    assert table.values.to_numpy().tolist() == [[1, 5], [3, 6], [3, 7], [4, 8]]
    assert table.notes[1:] == ["1 row of a stamp that was there already; each stamp has its rows' mean"]


def test_gaps_are_put_in_and_interpolated(read):
    table = read(csv(*(f"{HOURS[i]},{v}" for i, v in ((0, 1), (1, 2), (2, 4), (5, 10)))))
    assert table.values["a"].isna().tolist() == [False, False, False, True, True, False]
    assert table.filled["a"].tolist() == [1, 2, 4, 6, 8, 10]
    assert list(table.values.index) == [pd.Timestamp(stamp) for stamp in HOURS[:6]]
    assert table.notes == ["2 rows missing, the first at 2024-01-01 03:00:00; put in and interpolated"]


def test_missing_values_are_interpolated(read):
    table = read(hourly("", 2, "NA", "null", 8, 3, 4, " nan "))
    assert table.filled["a"].tolist() == [2, 2, 4, 6, 8, 3, 4, 4]
    assert table.notes == [
        "column 'a': 4 values missing, the first at 2024-01-01 00:00:00; interpolated, at the ends the nearest value"
    ]


def test_words_and_nameless_numbers_are_left_out(read):
    table = read(hourly("0,1,x", "1,2,y", names="date,,a,word"))
    assert list(table.values) == ["a"]
    assert table.notes == ["left out, having no numbers or no name: '', 'word'"]


def test_the_time_column(read):
    """The first column of dates, or the named one; numbers are dates only if named."""
    text = csv("1,2024-01-01,2020-05-01,7", "2,2024-01-02,2020-06-01,8", "3,2024-01-03,2020-07-01,9", names="n,t,u,a")
    assert read(text, targets=["a"]).values.index.tolist() == list(pd.date_range("2024-01-01", periods=3))
    table = read(text, targets=["a"], time_column="u")
    assert (table.values.index.name, table.step_name) == ("u", "1 month")
    table = read(csv("2016,1", "2017,2", "2018,4", names="year,a"), time_column="year")
    assert table.step_name == "12 months"
    assert list(table.stamps_after(1)) == [pd.Timestamp("2019-01-01")]


@pytest.mark.parametrize(
    ("cells", "first"),
    [
        (["2024-02-01", "2024-02-01 12:00", "2024-02-02"], "2024-02-01"),
        (["13/02/2024", "14/02/2024", "15/02/2024"], "2024-02-13"),
        ([f"{hour // 24 + 1:02}/02/2024 {hour % 24:02}:00" for hour in range(24 * 15)], "2024-02-01"),
        (["02/13/2024", "02/14/2024", "02/15/2024"], "2024-02-13"),
        (["1990/1/1 0:00", "1990/1/2 0:00", "1990/1/3 0:00"], "1990-01-01"),
        (["2024-03-30T12:00+01:00", "2024-03-31T13:00+02:00", "2024-04-01T13:00+02:00"], "2024-03-30 11:00+00:00"),
    ],
)
def test_forms_of_dates(cells, first, read):
    table = read(csv(*(f"{cell},1" for cell in cells)))
    assert table.values.index[0] == pd.Timestamp(first)


@pytest.mark.parametrize(
    ("start", "freq", "name", "season", "following"),
    [
        ("2024-01-01", "h", "1 hour", 24, ["2024-01-01 20:00", "2024-01-01 21:00"]),
        ("2024-01-01", "15min", "15 minutes", 96, ["2024-01-01 05:00", "2024-01-01 05:15"]),
        ("2024-01-01", "7min", "7 minutes", 1, ["2024-01-01 02:20", "2024-01-01 02:27"]),
        ("2024-02-10", "D", "1 day", 7, ["2024-03-01", "2024-03-02"]),
        ("2024-01-01", "B", "1 business day", 5, ["2024-01-29", "2024-01-30"]),
        ("2024-01-02", "7D", "7 days", 52, ["2024-05-21", "2024-05-28"]),
        ("2024-01-01", "MS", "1 month", 12, ["2025-09-01", "2025-10-01"]),
        ("2024-01-31", "ME", "1 month", 12, ["2025-09-30", "2025-10-31"]),
        ("2024-01-01", "QS", "3 months", 4, ["2029-01-01", "2029-04-01"]),
        ("2024-03-31", "QE", "3 months", 4, ["2029-03-31", "2029-06-30"]),
        ("2024-01-01", "YS", "12 months", 1, ["2044-01-01", "2045-01-01"]),
        ("2024-01-01", "30D", "30 days", 1, ["2025-08-23", "2025-09-22"]),
    ],
)
def test_step_season_and_stamps_after_the_last(start, freq, name, season, following):
    """Of twenty rows, one of which is missing."""
    table = read_table(dated(start, 20, freq).drop(index=pd.date_range(start, periods=20, freq=freq)[8]))
    assert (table.step_name, table.season) == (name, season)
    assert table.filled["a"].tolist() == list(range(20))
    assert list(table.stamps_after(2)) == [pd.Timestamp(stamp) for stamp in following]


def test_the_past_is_filled_from_the_past_alone():
    values = np.array([NAN, 1, NAN, NAN, 4, NAN, 8, NAN, NAN, 20])
    table = Table(dated("2024-01-01", 10, "D", a=values, b=np.arange(10.0)), pd.Timedelta(days=1))
    for end, expected in ((4, [1, 1, 1, 1]), (5, [1, 1, 2, 3, 4]), (6, [1, 1, 2, 3, 4, 4]), (9, [4, 6, 8, 8, 8])):
        past = table.past(end, len(expected))
        assert past[:, 0].tolist() == expected
        assert past[:, 1].tolist() == list(range(end - len(expected), end))


@pytest.mark.parametrize("season", [1, 3])
def test_the_backtest_against_a_loop(season):
    """All origins, known values alone; the naive forecast by its definition."""
    values = np.random.default_rng(0).standard_normal((40, 2)).cumsum(0)
    values[[5, 31, 32, 37], 1] = NAN
    table = Table(dated("2024-01-01", 40, "D", a=values[:, 0], b=values[:, 1]), pd.Timedelta(days=1))
    errors = backtest(lambda past: past[:, -1:, :, None].repeat(4, 1) + 1, table, 30, 6, 4, season, [0.5])
    for column, name in enumerate("ab"):
        model, naive = [], []
        for begin in range(30, 40 - 4 + 1):
            past = list(pd.Series(values[:begin, column]).interpolate())
            for ahead in range(4):
                truth = values[begin + ahead, column]
                if not np.isnan(truth):
                    model.append(abs(past[-1] + 1 - truth))
                    naive.append(abs(past[begin - season + ahead % season] - truth))
        scale = np.nanmean([abs(values[t, column] - values[t - season, column]) for t in range(season, 30)])
        expected = [np.mean(model), np.mean(naive), np.mean(model) / scale, np.mean(naive) / scale]
        np.testing.assert_allclose(errors.loc[name, ["MAE", "naive MAE", "MASE", "naive MASE"]], expected)


def noise(rows, seed=0, missing=()):
    values = np.random.default_rng(seed).standard_normal((rows, 2)) * [1, 10]
    values[list(missing)] = NAN
    return Table(dated("2024-01-01", rows, "D", a=values[:, 0], b=values[:, 1]), pd.Timedelta(days=1))


def always(*forecasts):
    """The same quantiles for every column and step, four steps ahead."""
    return lambda past: np.broadcast_to(np.array(forecasts, dtype=float), (len(past), 4, 2, len(forecasts)))


def test_coverage_counts_the_known_values_at_or_below_each_quantile():
    table = noise(60, missing=(45, 46, 52))
    errors = backtest(always(-1, 0, 2), table, 40, 5, 4, 3, [0.2, 0.5, 0.9])
    for column in "ab":
        truth = np.concatenate([table.values[column].to_numpy()[begin : begin + 4] for begin in range(40, 57)])
        truth = truth[~np.isnan(truth)]
        shares = [(truth <= at).mean() for at in (-1, 0, 2)]
        names = ["below q0.2", "below q0.5", "below q0.9", "q0.2 to q0.9"]
        np.testing.assert_allclose(errors.loc[column, names], [*shares, shares[2] - shares[0]])
        assert errors.loc[column, "MAE"] == pytest.approx(np.abs(truth).mean())


def test_calibrated_quantiles_cover_what_they_say():
    """Of forecasts that are far too narrow and off the middle; the median, which is the forecast, is not moved."""
    quantiles, table = [0.1, 0.5, 0.9], noise(3000, missing=range(1500, 1510))
    narrow = always(0.3, 0.31, 0.32)
    predict = calibrated(narrow, table, range(100, 1900), 5, 4, quantiles)
    raw, mended = (backtest(p, table, 2000, 5, 4, 7, quantiles) for p in (narrow, predict))
    assert (raw["q0.1 to q0.9"] < 0.1).all()
    np.testing.assert_allclose(mended["below q0.1"], 0.1, atol=0.03)
    np.testing.assert_allclose(mended["below q0.9"], 0.9, atol=0.03)
    assert (predict(np.zeros((1, 5, 2)))[..., 1] == 0.31).all()
    one = calibrated(always(0, 0, 0), noise(9), range(5, 6), 5, 4, [0.25, 0.5, 0.8])(np.zeros((1, 5, 2)))
    known = np.sort(noise(9).values.to_numpy()[5:], 0)
    lower, upper = known[0] + 0.25 * (known[1] - known[0]), known[3]  # the 1.25th and the fourth of four
    assert (lower < 0).all() and upper[0] < 0 < upper[1]
    np.testing.assert_allclose(one[0, 0], [[lower[0], 0, 0], [lower[1], 0, upper[1]]])  # never across the median
    blank = Table(table.values.assign(a=NAN), table.step)
    unknown = calibrated(lambda past: narrow(past[..., :2]), blank, range(100, 200), 5, 4, quantiles)
    assert unknown(np.zeros((1, 5, 2)))[0, 0, 0].tolist() == [0.3, 0.31, 0.32]


def test_the_naive_forecast_repeats_the_last_season():
    assert naive_forecast(np.arange(5.0)[None, :, None], 2, 5)[0, :, 0].tolist() == [3, 4, 3, 4, 3]


def test_plan_shrinks_the_look_back_or_refuses():
    assert Plan.of(69680, 96, 96) == Plan(69680 - 6968 - 3484, 69680 - 6968, 192)
    assert Plan.of(5000, 24, 24).look_back == 96
    assert Plan.of(5000, 24, 1440).look_back == 336
    assert Plan.of(144, 12, 12) == Plan(144 - 14 - 19, 144 - 14, 49)  # (111 - 12) // 2
    assert Plan.of(59, 12, 12).look_back == 8
    with pytest.raises(ValueError, match=r"horizon=12 needs at least 59 rows, and there are 58; .* at most 11"):
        Plan.of(58, 12, 12)
    with pytest.raises(ValueError, match=r"needs at least 27 rows, and there are 5; give more$"):
        Plan.of(5, 1, 1)
    with pytest.raises(ValueError, match="look_back=50 is not valid; use at most 49: there are 144 rows"):
        Plan.of(144, 12, 12, look_back=50)
    with pytest.raises(ValueError, match="look_back=7 is not valid; use at least 8"):
        Plan.of(144, 12, 12, look_back=7)


def trained_on(monkeypatch, folder, frame):
    """The rows that training and the choice of the checkpoint are given, and the weights they lead to."""
    module, given = importlib.import_module("titans.forecasting.forecast"), []

    def spy(config, task, **choices):
        data = task.load(config)
        given.extend([data.train.values, data.validation.values])
        return train(config, task, **choices)

    monkeypatch.setattr(module, "train", spy)
    forecast(frame, 6, look_back=12, tokens=1000, run=folder, say=lambda text: None, progress=False)
    return given, load_run(str(folder))[0].state_dict()


def test_training_sees_no_held_out_row(tmp_path, monkeypatch):
    """Nor does a gap across the border carry one in. Of 200 rows, 20 are held out, 13 before choose the checkpoint."""
    frame = waves()[["a", "b"]]
    frame.iloc[176:184] = NAN
    given, weights = trained_on(monkeypatch, tmp_path / "a", frame)
    rows = frame.iloc[:180].ffill()
    rows = (rows - rows[:167].mean()) / rows[:167].std(ddof=0)
    np.testing.assert_allclose(given[0], rows[:167], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(given[1], rows[167 - 12 :], rtol=1e-5, atol=1e-5)
    later = frame.copy()
    later.iloc[184:] = later.iloc[184:] * -3 + 100
    given_later, weights_later = trained_on(monkeypatch, tmp_path / "b", later)
    assert all(np.array_equal(one, other) for one, other in zip(given, given_later, strict=True))
    assert all(torch.equal(weights[name], weights_later[name]) for name in weights)


def command(tmp_path, data, *options):
    return main(["forecast", str(data), "-o", str(tmp_path / "out.csv"), *map(str, options)])


def test_end_to_end(tmp_path, capsys):
    """Forecast, picture, kept run and report, of a file with every mend in it."""
    frame = waves(rows=400).reset_index(names="when").astype({"when": str})
    frame.loc[50:52, "a"] = NAN
    frame = pd.concat([frame.drop(index=[100, 101]), frame.loc[[7]]])
    with gzip.open(tmp_path / "data.csv.gz", "wt") as file:
        file.write(frame.sample(frac=1, random_state=0).to_csv(index=False))
    options = ["--horizon", 12, "--tokens", 2e5, "--plot", tmp_path / "new" / "out.png", "--run", tmp_path / "run"]
    assert command(tmp_path, tmp_path / "data.csv.gz", *options) == 0
    printed = capsys.readouterr().out
    for words in ("400 rows of 3 columns", "1 hour apart", "rows sorted", "1 row of a stamp", "2 rows missing",
                  "'a': 3 values missing", "'k' never changes: 7.5 forecast",
                  "29 forecasts of 12 rows within the last 40", "from 2024-01-16 00:00:00", "look-back 96",
                  "repeats the last 24 rows"):  # fmt: skip
        assert words in printed
    assert "The model was better" in printed or "The seasonal-naive forecast was as good or better" in printed
    out = pd.read_csv(tmp_path / "out.csv", index_col="when", parse_dates=True)
    assert list(out.index) == list(pd.date_range("2024-01-17 16:00", periods=12, freq="h"))
    assert list(out) == ["a", "b", "k"]
    assert np.isfinite(out.to_numpy()).all()
    assert (out["k"] == 7.5).all()
    truth = waves(rows=412).iloc[400:]
    assert np.abs(out["a"] - truth["a"]).mean() < 0.3, "of a wave of 1"
    assert np.abs(out["b"] - truth["b"]).mean() < 15, "of a wave of 50"
    assert (tmp_path / "new" / "out.png").read_bytes()[:4] == b"\x89PNG"
    assert load_run(str(tmp_path / "run"))[0].config.prediction_length == 12
    assert not list(tmp_path.rglob("*.part"))


def test_python_and_the_verdict():
    result = forecast(waves(), 6, targets=["b"], look_back=12, tokens=1000, say=lambda text: None, progress=False)
    assert result.frame.shape == (6, 1)
    known = waves()["b"].to_numpy()
    naive = [abs(known[begin - 24 + ahead] - known[begin + ahead]) for begin in range(180, 195) for ahead in range(6)]
    assert result.errors.loc["b", "naive MAE"] == pytest.approx(np.mean(naive))
    result.errors["MAE"] = result.errors["naive MAE"]
    assert result.verdict() == "The seasonal-naive forecast was as good or better: use that."
    result.errors["MAE"] *= 0.9
    assert result.verdict() == "The model was better."
    result.errors.loc["c"] = [2, 1, 2, 1]
    assert result.verdict() == (
        "The model was better on 1 of 2 columns; the seasonal-naive forecast was as good or better on c."
    )
    result.errors["MAE"] = NAN
    assert "neither forecast can be judged" in result.verdict()


def test_quantiles_end_to_end(tmp_path, capsys):
    waves(rows=400).to_csv(tmp_path / "data.csv")
    options = ["--horizon", 6, "--tokens", 3e4, "--quantiles", 0.1, 0.5, 0.9, "--plot", tmp_path / "out.png"]
    assert command(tmp_path, tmp_path / "data.csv", *options) == 0
    printed = capsys.readouterr().out
    assert "| MASE | naive MASE | below q0.1 | below q0.5 | below q0.9 | q0.1 to q0.9 |" in printed
    out = pd.read_csv(tmp_path / "out.csv", index_col=0)
    assert list(out) == ["a", "a q0.1", "a q0.9", "b", "b q0.1", "b q0.9", "k", "k q0.1", "k q0.9"]
    for name in "ab":
        assert ((out[f"{name} q0.1"] <= out[name]) & (out[name] <= out[f"{name} q0.9"])).all()
    assert (out[["k", "k q0.1", "k q0.9"]] == 7.5).all(axis=None)
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"


def test_bad_quantiles_name_the_mend():
    with pytest.raises(ValueError, match=r"quantiles=\[0\.9, 0\.5\] is not valid; use numbers between 0 and 1"):
        forecast(waves(), 6, quantiles=[0.9, 0.5])
    frame = waves().rename(columns={"b": "a q0.1"})
    with pytest.raises(ValueError, match=r"column='a q0\.1' is not valid; use another name: it is that of a quantile"):
        forecast(frame, 6, quantiles=[0.1, 0.5])


def test_columns_that_never_change_alone():
    frame = dated("2024-01-01", 60, "D", k=np.full(60, 3.0)).drop(index=pd.Timestamp("2024-01-20"))
    result = forecast(frame, 3, say=lambda text: None)
    assert result.frame["k"].tolist() == [3, 3, 3]
    assert result.report() == "'k' never changes: 3 forecast"


def test_a_season_too_long_for_the_rows():
    """Noted where it was inferred, refused where it was asked for."""
    frame = waves(rows=50)
    said = []
    result = forecast(frame, 2, targets=["a"], tokens=100, say=said.append, progress=False)
    assert result.season == 1
    assert "note: too few rows for a season of 24; the naive forecast repeats the last row" in said[0]
    with pytest.raises(ValueError, match="season=23 is not valid; use at most 22: half of the rows not held out"):
        forecast(frame, 2, season=23)
    with pytest.raises(ValueError, match="season=0 is not valid"):
        forecast(frame, 2, season=0)
    with pytest.raises(ValueError, match="horizon=0 is not valid"):
        forecast(frame, 0)


def test_what_is_there_is_not_overwritten(tmp_path, capsys):
    waves().to_csv(tmp_path / "data.csv")
    (tmp_path / "out.csv").write_text("mine")
    assert command(tmp_path, tmp_path / "data.csv", "--horizon", 6) == 2
    assert "out.csv' exists already; delete it or use another name" in capsys.readouterr().err
    assert (tmp_path / "out.csv").read_text() == "mine"
    (tmp_path / "out.csv").unlink()
    (tmp_path / "out.png").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("mine")
    for options, message in (
        (["--plot", tmp_path / "out.png"], "out.png' exists already"),
        (["--plot", "out.txt"], "plot='out.txt' is not valid; use a name in .png, .pdf, .svg"),
        (["--run", tmp_path / "run"], "run' holds a run already; use another folder"),
        (["--target", "c"], "target='c' is not valid"),
        (["--hrizon", 3], "'hrizon' is no option; did you mean 'horizon'?"),
    ):
        assert command(tmp_path, tmp_path / "data.csv", "--horizon", 6, *options) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


def test_the_file_is_whole_or_not_there(tmp_path, monkeypatch, capsys):
    """Written under another name first, so that an interrupted writing leaves no half of it."""
    waves().to_csv(tmp_path / "data.csv")

    def stop(source, target):
        if str(target).endswith("out.csv"):
            raise KeyboardInterrupt
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", stop)
    options = ["--horizon", 6, "--look-back", 12, "--tokens", 500, "--target", "a", "b"]
    assert command(tmp_path, tmp_path / "data.csv", *options) == 130
    assert not (tmp_path / "out.csv").exists()


def test_without_pandas_the_mend_is_named(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("titans.forecasting")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert command(tmp_path, "data.csv", "--horizon", 6) == 2
    assert "pip install 'titans[forecast]'" in capsys.readouterr().err
