"""Forecasting: the protocol's numbers, scaling, leaks, metrics, files that are wrong, runs from end to end."""

import gzip
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from titans.cli import main
from titans.tasks import get_task
from titans.tasks._forecasting import MODELS, dataset_experiment
from titans.tasks.forecasting import ForecastingEvaluation
from titans.training.compare import Experiment, compare
from titans.training.config import parse_config
from titans.training.forecasters import KINDS, build_forecaster
from titans.training.models import load_run
from titans.training.run import train
from titans.training.series import borders, load_windows, read_series

TASK = get_task("forecasting")
SMALL = {
    "titans": {"variant": "lmm", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "patch_length": 4,
               "num_memory_heads": 1, "memory_expansion": 1, "chunk_size": 4, "patch_stride": 2},
    "patchtst": {"d_model": 8, "ffn_dim": 8, "num_hidden_layers": 1, "patch_length": 4, "patch_stride": 2},
    "itransformer": {"hidden_size": 8, "n_heads": 2, "e_layers": 1, "d_ff": 8},
    **{kind: {} for kind in KINDS},
}  # fmt: skip


def write(path, values, names=None):
    """A CSV file of the literature's form."""
    lines = [",".join(["date", *(names or [f"c{i}" for i in range(values.shape[1])])])]
    lines += [f"2016-07-01 {i}," + ",".join(map(repr, map(float, row))) for i, row in enumerate(values)]
    path.write_text("\n".join(lines) + "\n")
    return path


def walk(rows, channels, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, channels)).cumsum(0)


@pytest.fixture
def waves(tmp_path):
    """Two noisy waves of 12 rows: 140, 20 and 40 rows."""
    time = np.arange(200)[:, None]
    noise = 0.1 * np.random.default_rng(0).standard_normal((200, 2))
    return write(tmp_path / "waves.csv", np.sin(2 * np.pi * (time / 12 + [0, 0.3])) * [1, 50] + noise)


def test_the_published_splits():
    etth = {"train": (0, 8640), "validation": (8640, 11520), "test": (11520, 14400)}
    assert borders("x/ETTh1.csv.gz", 17420) == etth
    ettm = {"train": (0, 34560), "validation": (34560, 46080), "test": (46080, 57600)}
    assert borders("ETTm2.csv", 69680) == ettm
    illness = {"train": (0, 676), "validation": (676, 773), "test": (773, 966)}
    assert borders("national_illness.csv", 966) == illness
    exchange = {"train": (0, 5311), "validation": (5311, 6071), "test": (6071, 7588)}
    assert borders("exchange_rate.csv", 7588) == exchange
    with pytest.raises(ValueError, match=r"rows of ETTh1\.csv=14399 is not valid; use at least 14400"):
        borders("ETTh1.csv", 14399)


@pytest.mark.parametrize("horizon", [96, 720])
def test_windows_of_etth1(tmp_path, horizon):
    """Counts of stride 1; the first forecast row of a split is its first, the last one its last."""
    values = np.arange(17420.0)[:, None] * [1, -2]
    windows = load_windows(str(write(tmp_path / "ETTh1.csv", values)), 96, horizon)
    assert {split: len(w) for split, w in windows.items()} == {
        "train": 8640 - 96 - horizon + 1, "validation": 2880 - horizon + 1, "test": 2880 - horizon + 1}  # fmt: skip
    mean, deviation = values[:8640].mean(0), values[:8640].std(0)
    for split, first, end in (("train", 96, 8640), ("validation", 8640, 11520), ("test", 11520, 14400)):
        for index, begin in ((0, first), (len(windows[split]) - 1, end - horizon)):
            item = windows[split][index]
            rows = [item[name].astype(np.float64) * deviation + mean for name in ("past_values", "future_values")]
            np.testing.assert_allclose(rows[0], values[begin - 96 : begin], atol=0.02)
            np.testing.assert_allclose(rows[1], values[begin : begin + horizon], atol=0.02)
        with pytest.raises(IndexError):
            windows[split][len(windows[split])]


def test_scaled_by_train_rows_alone(tmp_path):
    values = walk(100, 3)
    values[:, 2] = 4.0  # shifted alone
    train = load_windows(str(write(tmp_path / "a.csv", values)), 8, 4)["train"]
    np.testing.assert_allclose(train.values.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(train.values.std(0), [1, 1, 0], atol=1e-6)
    assert len(train.values) == 70


@pytest.mark.parametrize(
    ("row", "moved"), [(69, {"train", "validation", "test"}), (70, {"validation"}), (90, {"test"})]
)
def test_later_rows_leak_into_no_earlier_split(tmp_path, row, moved):
    """Of 100 rows, 70 train and 20 test; a look-back of 8 reaches from row 80 on into 72."""
    values = walk(100, 2)
    changed = values.copy()
    changed[row] += 5
    before, after = (
        load_windows(str(write(tmp_path / name, v)), 8, 4) for name, v in (("a.csv", values), ("b.csv", changed))
    )
    assert {split for split in before if not np.array_equal(before[split].values, after[split].values)} == moved


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_metrics_against_a_loop_with_no_window_dropped(waves, batch_size):
    model = build_forecaster({"type": "dlinear"}, context_length=8, prediction_length=5, num_input_channels=2).eval()
    data = TASK.data_class(path=str(waves), horizon=5)
    metrics = TASK.evaluate(model, None, data, ForecastingEvaluation(batch_size=batch_size))
    values = read_series(waves)
    values = (values - values[:140].mean(0)) / values[:140].std(0)
    errors = []
    for first in range(160, 200 - 5 + 1):
        past = torch.tensor(values[first - 8 : first], dtype=torch.float32)[None]
        errors.append(model(past).prediction_outputs[0].detach().numpy() - values[first : first + 5])
    errors = np.array(errors)
    assert metrics["windows"] == len(errors) == 36
    np.testing.assert_allclose(metrics["mse"], (errors**2).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["mae"], np.abs(errors).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["mse_by_step"], (errors**2).mean((0, 2)), rtol=1e-5)
    np.testing.assert_allclose(metrics["mae_by_channel"], np.abs(errors).mean((0, 1)), rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@torch.no_grad()
def test_metrics_with_the_memory_carried_against_a_stream_for_each_window(waves, batch_size):
    """A window's stream is read anew, from the split's first look-back on."""
    spec = {"type": "titans", **SMALL["titans"]}
    model = build_forecaster(spec, context_length=8, prediction_length=5, num_input_channels=2).eval()
    data = TASK.data_class(path=str(waves), horizon=5, carry=True)
    metrics = TASK.evaluate(model, None, data, ForecastingEvaluation(batch_size=batch_size))
    rows = torch.from_numpy(load_windows(str(waves), 8, 5)["test"].values)
    errors = []
    for first in range(8, len(rows) - 5 + 1):
        stream = model.update(rows[None, :first])
        errors.append(model.forecast(stream).prediction_outputs[0] - rows[first : first + 5])
    errors = torch.stack(errors).double()
    assert metrics["windows"] == len(errors) == 36
    assert metrics["mse"] == pytest.approx((errors**2).mean().item(), rel=1e-5)
    np.testing.assert_allclose(metrics["mae_by_step"], errors.abs().mean((0, 2)), rtol=1e-5)
    plain = TASK.evaluate(model, None, TASK.data_class(path=str(waves), horizon=5), ForecastingEvaluation())
    assert metrics["mse"] != pytest.approx(plain["mse"], rel=1e-4)


def test_train_and_eval_with_the_memory_carried(waves, tmp_path, capsys):
    values = {
        "output": str(tmp_path / "run"),
        "model": {"type": "titans", **SMALL["titans"]},
        "training": {"length": 24, "batch_size": 8, "tokens": 24 * 8 * 60, "eval_every": 0.25, "learning_rate": 1e-2},
        "data": {"path": str(waves), "horizon": 6, "carry": True},
    }
    result = train(parse_config(TASK, values), TASK, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] / 2
    assert result["metrics"]["mse"] < 0.5  # of values of variance 1
    out = tmp_path / "out.json"
    for options, same in (([], True), (["--data.carry", "false"], False)):
        assert main(["eval", "forecasting", values["output"], "--json", str(out), *options]) == 0
        assert (json.loads(out.read_text())["mse"] == pytest.approx(result["metrics"]["mse"], rel=1e-6)) == same
    capsys.readouterr()


def test_what_has_no_memory_cannot_carry_it(waves, tmp_path):
    data = {"path": str(waves), "horizon": 5, "carry": True}
    with pytest.raises(ValueError, match=r"data\.carry=True .*use false: a 'dlinear' has no memory to carry"):
        TASK.load(parse_config(TASK, {"model": {"type": "dlinear"}, "data": data, "training": {"length": 8}}))
    model = build_forecaster({"type": "dlinear"}, context_length=8, prediction_length=5, num_input_channels=2)
    with pytest.raises(ValueError, match="use false: a LinearForecaster has no memory to carry"):
        TASK.evaluate(model, None, TASK.data_class(**data), ForecastingEvaluation())


def test_quantiles_from_the_command_line():
    config = parse_config(TASK, arguments=["--model.quantiles", "[0.1, 0.5, 0.9]"])
    assert config.model["quantiles"] == [0.1, 0.5, 0.9]
    build_forecaster(config.model, context_length=96, prediction_length=5, num_input_channels=2)


def test_coverage_and_pinball_loss_against_a_loop(waves):
    spec = {**SMALL["titans"], "quantiles": [0.25, 0.5, 0.9]}
    model = build_forecaster(spec, context_length=8, prediction_length=5, num_input_channels=2).eval()
    metrics = TASK.evaluate(model, None, TASK.data_class(path=str(waves), horizon=5), ForecastingEvaluation(7))
    windows = load_windows(str(waves), 8, 5)["test"]
    below, losses = [], []
    for i in range(len(windows)):
        with torch.no_grad():
            made = model(torch.from_numpy(windows[i]["past_values"])[None]).quantile_outputs[0].numpy()
        off = windows[i]["future_values"][..., None] - made
        below.append(off <= 0)
        losses.append(np.where(off > 0, [0.25, 0.5, 0.9], [-0.75, -0.5, -0.1]) * off)
    np.testing.assert_allclose(metrics["coverage"], np.mean(below, (0, 1, 2)))
    assert 0 < metrics["interval_coverage"] == pytest.approx(metrics["coverage"][2] - metrics["coverage"][0])
    assert metrics["pinball"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert list(TASK.summary(metrics)) == ["MSE", "MAE", "pinball loss", "between 0.25 and 0.9"]
    assert f"- 0.25: {metrics['coverage'][0]:.3f}" in TASK.report(metrics)
    json.dumps(metrics)


def test_linear_models_against_their_definitions():
    x = torch.randn(2, 30, 3)
    models = {
        k: build_forecaster({"type": k}, context_length=30, prediction_length=4, num_input_channels=3) for k in KINDS
    }
    for c in range(3):
        row = x[1, :, c]
        last = models["nlinear"].rest(row - row[-1]) + row[-1]
        torch.testing.assert_close(models["nlinear"](x).prediction_outputs[1, :, c], last)
        padded = torch.cat([row[:1].expand(12), row, row[-1:].expand(12)])
        trend = torch.stack([padded[i : i + 25].mean() for i in range(30)])
        expected = models["dlinear"].trend(trend) + models["dlinear"].rest(row - trend)
        torch.testing.assert_close(models["dlinear"](x).prediction_outputs[1, :, c], expected)


def test_the_seed_decides_the_weights_of_an_itransformer():
    sizes = {"context_length": 24, "prediction_length": 6, "num_input_channels": 2}
    spec = {"type": "itransformer", **SMALL["itransformer"]}
    one, same, other = (build_forecaster(spec, **sizes, seed=seed).state_dict() for seed in (1, 1, 2))
    name = "network.projector.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])


def test_an_itransformer_without_its_package_names_the_extra(monkeypatch, tmp_path):
    sizes = {"context_length": 24, "prediction_length": 6, "num_input_channels": 2}
    build_forecaster({"type": "itransformer"}, **sizes).save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "neuralforecast.models", None)
    for attempt in (lambda: build_forecaster({"type": "itransformer"}, **sizes), lambda: load_run(str(tmp_path))):
        with pytest.raises(ImportError, match=r"pip install 'titans\[forecast\]'"):
            attempt()


@pytest.mark.parametrize("kind", SMALL)
def test_train_and_eval(kind, waves, tmp_path, capsys):
    values = {
        "output": str(tmp_path / "run"),
        "model": {"type": kind, **SMALL[kind]},
        "training": {"length": 24, "batch_size": 8, "tokens": 24 * 8 * 60, "eval_every": 0.25, "learning_rate": 1e-2},
        "data": {"path": str(waves), "horizon": 6},
    }
    result = train(parse_config(TASK, values), TASK, progress=False)
    assert result["metrics"]["mse"] < 0.5  # of values of variance 1
    assert result["tokens"] == 24 * 8 * 60
    assert list(TASK.summary(result["metrics"])) == ["MSE", "MAE"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert result["validation_loss"] == min(line["eval_loss"] for line in lines if "eval_loss" in line)
    assert (tmp_path / "run" / "horizon.png").exists()
    model, tokenizer = load_run(values["output"])
    assert tokenizer is None
    assert type(model) is type(
        build_forecaster(values["model"], context_length=24, prediction_length=6, num_input_channels=2)
    )
    out = tmp_path / "out.json"
    assert main(["eval", "forecasting", values["output"], "--json", str(out)]) == 0
    assert "35 test windows, look-back 24, horizon 6, 2 channels" in capsys.readouterr().out
    assert json.loads(out.read_text())["mse"] == pytest.approx(result["metrics"]["mse"], rel=1e-6)
    assert out.with_suffix(".png").exists()
    assert main(["eval", "forecasting", values["output"], "--data.horizon", "7"]) == 2
    assert "data.horizon=7 is not valid; use 6" in capsys.readouterr().err
    other = write(tmp_path / "other.csv", walk(200, 3))
    assert main(["eval", "forecasting", values["output"], "--data", str(other)]) == 2
    assert "=3 is not valid; use a file with the model's 2" in capsys.readouterr().err


def test_compare(waves, tmp_path):
    """Tuning, seeds and table; the linear models and Titans under one budget."""
    models = {kind: {"model": {"type": kind, **SMALL[kind]}} for kind in ("titans", "dlinear")}
    experiment = Experiment(
        task="forecasting", output=str(tmp_path / "out"), models=models, parameter_tolerance=9.0,
        data={"path": str(waves), "horizon": 6}, tuning={"learning_rate": [1e-3, 1e-2], "tokens": 24 * 8 * 4},
        training={"length": 24, "batch_size": 8, "tokens": 24 * 8 * 8, "eval_every": 1},
    )  # fmt: skip
    results = compare(experiment, TASK, say=lambda text: None)
    assert [len(entry["runs"]) for entry in results["models"].values()] == [1, 1]
    assert "| MSE | MAE |" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "horizon.png").exists()


def test_a_dataset_by_its_name(tmp_path, capsys):
    """Every horizon, tuned, in one command; the protocol's numbers."""
    write(tmp_path / "national_illness.csv", walk(400, 2))
    data = ["--dataset", "ILI", "--data", str(tmp_path / "national_illness.csv")]
    options = ["--horizons", "2", "4", "--seeds", "1", "--windows", "128", "--models", "dlinear"]
    places = ["--output", str(tmp_path / "out"), "--json", str(tmp_path / "out.json")]
    assert main(["eval", "forecasting", *data, *options, *places]) == 0
    head = "| model | parameters | tokens/s, horizon=2 | tokens/s, horizon=4 | MSE, mean | MAE, mean | MSE, horizon=2 |"
    assert head in capsys.readouterr().out
    results = json.loads((tmp_path / "out.json").read_text())
    assert set(results["means"]) == {"dlinear"}
    assert list(results["variants"]) == ["horizon=2", "horizon=4"]
    run = results["variants"]["horizon=4"]["models"]["dlinear"]["runs"][0]
    assert (run["tokens"], run["metrics"]["look_back"], run["metrics"]["windows"]) == (128 * 36, 36, 80 - 4 + 1)


def test_the_protocol_of_the_datasets():
    for name, look_back, horizons in (("ETTh2", 96, [96, 192, 336, 720]), ("ILI", 36, [24, 36, 48, 60])):
        values = dataset_experiment(name, f"{name}.csv", "out", models=list(MODELS))
        assert values["vary"] == {"data.horizon": horizons}
        assert values["training"]["tokens"] == 24_000 * look_back
        for variant in Experiment.from_dict(values).variants().values():
            for model in variant.models:
                config = variant.config(TASK, model, "count")
                assert config.training.steps == 750
                TASK.build_model(config, SimpleNamespace(train=SimpleNamespace(channels=7)))


def test_datasets_that_are_wrong_name_the_mend(capsys):
    for change, message in (
        ({"dataset": "ETTh3"}, "dataset='ETTh3' is not valid; use 'ETTh"),
        ({"models": ["dlineer"]}, "models='dlineer' is not valid; use 'dlinear'"),
        ({"seeds": 0}, "seeds=0 is not valid"),
        ({"windows": 0}, "windows=0 is not valid"),
        ({"dataset": "ETTh1", "path": "x/ETTm1.csv"}, r"use a file of ETTh1; by its name this is ETTm1, and split as"),
        ({"dataset": "ETTh1", "path": "hours.csv"}, "by its name this is a data set without 'ETT'"),
        ({"dataset": "ILI", "path": "ETTh1.csv"}, "use a file of ILI; by its name this is ETTh1"),
    ):
        with pytest.raises(ValueError, match=message):
            dataset_experiment(**{"dataset": "ILI", "path": "a.csv", "output": "out", **change})
    assert main(["eval", "forecasting", "--dataset", "ILI"]) == 2
    assert "data" in capsys.readouterr().err
    assert main(["eval", "forecasting", "--dataset", "ILI", "--data", "nowhere.csv"]) == 2
    assert "data.path='nowhere.csv' does not exist" in capsys.readouterr().err


def test_validation_loss_is_the_mean_over_its_windows(waves, tmp_path):
    """Sixteen windows in two whole batches."""
    training = {"length": 24, "batch_size": 8, "tokens": 24 * 8, "eval_every": 1}
    values = {"output": str(tmp_path / "run"), "model": {"type": "dlinear"}, "training": training,
              "data": {"path": str(waves), "horizon": 5}}  # fmt: skip
    result = train(parse_config(TASK, values), TASK, evaluate=False, progress=False)
    model, _ = load_run(values["output"])
    windows = load_windows(str(waves), 24, 5)["validation"]
    assert len(windows) == 16
    losses = [model(**{k: torch.from_numpy(v)[None] for k, v in windows[i].items()}).loss.item() for i in range(16)]
    assert result["validation_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; give a"),
        ("\n", "is empty; give a CSV file"),
        ("date,a\n", "nothing below it"),
        ("a,b\n1,2\n", r"columns a, b.*must begin with one of dates named 'date'"),
        ("date\n1\n", "followed by columns of numbers"),
        ("date,a,b\nx,1,2\ny,1\n", r"line 3 has 2 cells, its first line 3"),
        ("date,a,b\nx,1,2\ny,1,two\n", r"line 3, column 'b' holds 'two', no finite number; fill the gap"),
        ("date,a,b\nx,1,nan\n", r"line 2, column 'b' holds 'nan'"),
        ("date,a,b\nx,,2\n", r"line 2, column 'a' holds ''"),
        ("date,a\n" + "x,1\n" * 20, r"train rows of file\.csv=14 .* at least 20 \(look-back 16, horizon 4\)"),
        ("date,a\n" + "x,1\n" * 30, r"validation rows of file\.csv=3 is not valid; use at least 4 "),
        ("date,a\nx,1\n", r"train rows of file\.csv=0"),
        ("date,\0\n", "is not utf-8 text"),
    ],
)  # fmt: skip
def test_bad_files_name_the_mend(tmp_path, text, message):
    (tmp_path / "file.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_windows(str(tmp_path / "file.csv"), 16, 4)


def test_a_packed_file_quotes_and_blank_lines(tmp_path):
    with gzip.open(tmp_path / "file.csv.gz", "wt") as file:
        file.write('date,"a, b",c\r\n"2016, July",1.5,-2e1\r\n\r\nx,3,4\r\n\r\n')
    assert read_series(tmp_path / "file.csv.gz").tolist() == [[1.5, -20.0], [3.0, 4.0]]


def test_bad_options_name_the_mend(waves, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"data\.path=None is not valid; use a CSV file"):
        TASK.load(parse_config(TASK))
    with pytest.raises(FileNotFoundError, match=r"data\.path='nowhere\.csv' does not exist; give a CSV file"):
        load_windows("nowhere.csv", 8, 4)
    with pytest.raises(ValueError, match=r"data\.horizon=0 is not valid"):
        parse_config(TASK, {"data": {"horizon": 0}})
    with pytest.raises(ValueError, match=r"evaluation\.batch_size=0 is not valid"):
        parse_config(TASK, {"evaluation": {"batch_size": 0}})
    with pytest.raises(ValueError, match=r"training\.batch_size=128 is more than the 111 items of the training data"):
        train(parse_config(TASK, {"output": str(tmp_path / "run"), "model": {"type": "nlinear"},
                                  "data": {"path": str(waves), "horizon": 6},
                                  "training": {"length": 24, "batch_size": 128}}), TASK)  # fmt: skip
    sizes = {"context_length": 24, "prediction_length": 6, "num_input_channels": 2}
    for spec, message in (
        ({"type": "patchts"}, r"model\.type='patchts' is not valid; use 'patchtst'"),
        ({"quantiles": [0.1]}, r"quantiles=\[0\.1\] is not valid"),
        ({"type": "dlinear", "quantiles": [0.5]}, r"model\.quantiles is no setting of 'dlinear'"),
        ({"hiden_size": 8}, r"model\.hiden_size is no setting of 'titans'; use 'hidden_size'"),
        ({"type": "dlinear", "kind": "nlinear"}, r"model\.kind is no setting of 'dlinear'"),
        ({"type": "dlinear", "moving_average": 4}, r"moving_average=4 is not valid; use an odd number"),
        ({"type": "patchtst", "patch_length": 24}, "refused by PatchTSTConfig"),
        ({"context_length": 48}, r"model\.context_length is no setting"),
    ):
        with pytest.raises(ValueError, match=message):
            build_forecaster(spec, **sizes)
    assert main(["train", "--task", "forecasting", "--data", "nowhere.csv", "--output", str(tmp_path / "none")]) == 2
    assert "data.path='nowhere.csv' does not exist" in capsys.readouterr().err


def test_a_language_model_is_refused(waves):
    from titans.training.models import build_model

    model = build_model({"type": "llama", "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16},
                        vocab_size=258, eos_token_id=256, pad_token_id=257)  # fmt: skip
    with pytest.raises(ValueError, match="model='LlamaForCausalLM' is not valid; use a model trained on this task"):
        TASK.evaluate(model, None, TASK.data_class(path=str(waves)), ForecastingEvaluation())
