"""The benchmark runner: processes that take turns, honest rows, clear refusals. Nothing here judges a speed."""

import io
import json
import sys

import pytest
import torch

from titans.bench import layers, worker
from titans.bench.case import (
    DEFAULT_SIZES,
    PASSES,
    SUITES,
    TASKS,
    Case,
    Subject,
    builder,
    groups,
    suite,
    training_steps,
)
from titans.bench.run import bench, plot, table
from titans.cli import main
from titans.memory import MemoryMLP

TINY = {"dim": 16, "heads": 2, "head_dim": 8, "expansion": 2, "chunk_size": 8, "batch": 1}
TINY_MODEL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "chunk_size": 8, "reach": 8}


def build(case: Case) -> Subject:
    return builder(case)(case)


def plan(task="memory", **changes):
    arguments = {
        "subjects": ["titans", "sdpa"], "lengths": [24], "threads": [1], "dtypes": ["float32"], "passes": None,
        "device": "cpu", "sizes": TINY, "against": None,
    }  # fmt: skip
    return groups(task, **(arguments | changes))


def test_rows_of_a_run(tmp_path):
    rows = bench(plan(subjects=["sdpa", "titans", "matmul"], passes=["backward"]), rounds=2, say=lambda text: None)
    assert [row["name"] for row in rows] == ["sdpa", "titans", "matmul"]
    for row in rows:
        assert len(row["seconds"]) == 2
        assert row["tokens"] == 24
        low, high = row["quartiles"]
        assert low <= row["median"] <= high
    ratios = [a / b for a, b in zip(rows[0]["seconds"], rows[1]["seconds"], strict=True)]
    assert rows[1]["times_first"] == pytest.approx(sum(ratios) / 2)
    fractions = [a / b for a, b in zip(rows[2]["seconds"], rows[1]["seconds"], strict=True)]
    assert rows[1]["fraction_of_matmul"] == pytest.approx(sum(fractions) / 2)
    json.dumps(rows)
    assert table(rows).count("\n") == 4
    plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_what_takes_turns():
    """A length at a time, but all of them where nothing should depend on it."""
    together = [[case.length for case in group] for group in plan(subjects=["titans"], lengths=[8, 24])]
    assert together == [[8], [8], [24], [24]]
    for task in ("decode", "stream"):
        (group,) = plan(task, subjects=["mac", "lmm"], lengths=[8, 24], sizes=TINY_MODEL)
        assert [(case.length, case.subject) for case in group] == [(8, "mac"), (8, "lmm"), (24, "mac"), (24, "lmm")]


ELSEWHERE = ("titans-pytorch", "gated_delta_rule", "titans-triton")  # not installed with the tests, or for GPUs


@pytest.mark.parametrize(("task", "subject"), [(t, s) for t in TASKS for s in TASKS[t][1] if s not in ELSEWHERE])
def test_every_subject_runs_and_passes_its_check(task, subject, monkeypatch):
    monkeypatch.setattr("titans.bench.models.STREAM_TOKENS", 64)
    monkeypatch.setattr("titans.bench.models.DECODE_TOKENS", 3)
    tiny = {"memory": TINY, "op": {k: v for k, v in TINY.items() if k != "dim"}}.get(task, TINY_MODEL)
    sizes = DEFAULT_SIZES[task] | tiny
    if subject == "mamba2":
        sizes |= {"hidden_size": 64}  # a head of the library's has 64 dimensions
    measure = PASSES[task][-1]
    built = build(Case(task, subject, measure, 24, sizes=sizes))
    if built.check is not None:
        built.check()
    built.run()
    assert built.tokens > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_run_and_pass_their_check(dtype):
    pytest.importorskip("triton", reason="triton is not installed; pip install 'titans[kernels]'")
    sizes = DEFAULT_SIZES["op"] | {"heads": 1, "head_dim": 16, "expansion": 1, "chunk_size": 16, "batch": 1}
    built = build(Case("op", "titans-triton", "backward", 16, dtype=dtype, sizes=sizes))
    built.check()
    built.run()


def answers(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def run_worker(monkeypatch, subject, rounds):
    monkeypatch.setattr(worker, "builder", lambda case: lambda case: subject)
    case = {"task": "memory", "subject": "titans", "measure": "forward", "length": 1}
    monkeypatch.setattr(sys, "argv", ["worker", json.dumps(case | {"threads": torch.get_num_threads()})])
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n" * (1 + rounds)))
    worker.main()


def test_no_number_for_what_is_wrong(monkeypatch, capsys):
    def check():
        raise AssertionError("differs")

    run_worker(monkeypatch, Subject(lambda: None, 1, check), 3)
    assert answers(capsys) == [{"error": "differs"}]


def test_peak_memory_is_that_of_the_run(monkeypatch, capsys):
    run_worker(monkeypatch, Subject(lambda: torch.ones(25_000_000).sum(), 1), 1)
    first, second = answers(capsys)
    assert 90e6 < first["peak_bytes"] < 200e6
    assert second["seconds"] > 0


def test_the_check_notices_a_wrong_memory(monkeypatch):
    case = Case("op", "titans", "forward", 8, sizes=DEFAULT_SIZES["op"] | {"head_dim": 8, "chunk_size": 4})
    layers.check_memory(case, MemoryMLP(), "chunked")
    monkeypatch.setattr("titans.memory.chunked.widen", lambda x, mix: torch.cat([x, x], -1))
    with pytest.raises(AssertionError, match="differs from its reference"):
        layers.check_memory(case, MemoryMLP(), "chunked")


def test_a_row_with_an_error_stays_a_row():
    row = {"task": "memory", "name": "titans", "measure": "forward", "length": 8, "threads": 1, "dtype": "float32"}
    row["error"] = "differs"
    assert "| memory | titans | forward | 8 | 1 | float32 | differs |" in table([row])


@pytest.mark.parametrize(
    ("change", "named"),
    [({"subjects": ["titan"]}, "subjects='titan'"), ({"dtypes": ["float16"]}, "dtypes='float16'"),
     ({"passes": ["step"]}, "passes='step'"), ({"sizes": {"width": 3}}, "sizes='width'")],
)  # fmt: skip
def test_unknown_names_are_refused(change, named):
    with pytest.raises(ValueError, match=named):
        plan(**change)


EXPERIMENT = """
task: language
output: out
training: {length: 16, batch_size: 2}
vary: {training.length: [16, 24], training.batch_size: [3, 2]}
models:
  flat: {model: &lmm {variant: lmm, hidden_size: 16, num_hidden_layers: 1, num_memory_heads: 2, chunk_size: 8,
                      memory_depth: 1}}
  deep: {model: {<<: *lmm, memory_depth: 2}}
  llama: {model: {type: llama, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}}
"""


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(EXPERIMENT)
    return path


def test_models_of_an_experiment_take_turns_at_each_length(experiment):
    planned = training_steps(str(experiment), ["deep", "flat"], [1], ["float32"], "cpu")
    cases = [[(case.name, case.length, case.sizes["batch"]) for case in group] for group in planned]
    assert cases == [[("deep", 16, 3), ("flat", 16, 3)], [("deep", 24, 2), ("flat", 24, 2)]]
    assert [case.sizes["model"]["memory_depth"] for case in planned[0]] == [2, 1]


def test_command_times_an_experiment(experiment, tmp_path, capsys):
    out = tmp_path / "steps.json"
    options = ["--subjects", "[deep]", "--rounds", "1", "--output", str(out)]
    assert main(["bench", "--experiment", str(experiment), *options]) == 0, capsys.readouterr().err
    rows = json.loads(out.read_text())["rows"]
    assert [(row["name"], row["length"], row["tokens"]) for row in rows] == [("deep", 16, 48), ("deep", 24, 48)]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert out.with_suffix(".png").exists()


def test_an_experiments_models_are_checked_as_ours_are(experiment):
    ((deep, llama),) = training_steps(str(experiment), ["deep", "llama"], [1], ["float32"], "cpu")[:1]
    assert build(deep).check is not None
    assert build(llama).check is None


def test_forecasters_of_an_experiment(tmp_path, monkeypatch):
    """Planned at the file's channels; ours is timed only if it forecasts as with the reference."""
    data, path = tmp_path / "series.csv", tmp_path / "experiment.yaml"
    data.write_text("date,a,b\n" + "".join(f"{i},{i % 7},{i % 5}\n" for i in range(200)))
    model = "{hidden_size: 8, num_attention_heads: 2, num_hidden_layers: 1, chunk_size: 2, patch_length: 4}"
    path.write_text(
        f"{{task: forecasting, output: out, data: {{path: '{data}', horizon: 5}}, training: {{batch_size: 3}}, "
        f"vary: {{training.length: [16, 24]}}, "
        f"models: {{ours: {{model: {model}}}, flat: {{model: {{type: dlinear}}}}}}}}"
    )
    planned = training_steps(str(path), None, [1], ["float32"], "cpu")
    assert [[(case.name, case.length) for case in group] for group in planned] == [
        [("ours", 16), ("flat", 16)], [("ours", 24), ("flat", 24)]
    ]  # fmt: skip
    ours, flat = map(build, planned[1])
    assert flat.check is None
    ours.check()
    for subject in (ours, flat):
        subject.run()
        assert subject.tokens == 3 * 24
    monkeypatch.setattr("titans.memory.chunked.widen", lambda x, mix: torch.cat([x, x], -1))
    with pytest.raises(AssertionError, match="ours differs from the reference"):
        ours.check()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [("task: language", "task: mqar", "task='mqar'.* the task language or forecasting"),
     ("task: language", "task: language\ndata: {tokenizer: gpt2}", "data.tokenizer='gpt2'"),
     ("  deep:", "  wide:", "subjects='deep' is unknown; use one of flat, wide, llama"),
     ("[16, 24]", "[1, 24]", "training.length=1")],
)  # fmt: skip
def test_an_experiment_that_cannot_be_timed(experiment, old, new, message):
    experiment.write_text(EXPERIMENT.replace(old, new))
    with pytest.raises(ValueError, match=message):
        training_steps(str(experiment), ["deep"], [1], ["float32"], "cpu")


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_is_made_of_cases_that_exist(name):
    cases = [case for group in suite(name) for case in group]
    assert {case.task for case in cases} <= set(TASKS)
    assert all(case.subject in TASKS[case.task][1] for case in cases)
    with pytest.raises(ValueError, match="suite='cpu'"):
        suite("cpu")


def test_what_needs_a_gpu_or_a_package_says_so():
    with pytest.raises((ImportError, ValueError), match=r"flash-linear-attention|needs a GPU"):
        build(Case("op", "gated_delta_rule", "forward", 8, sizes=DEFAULT_SIZES["op"]))


def test_command_writes_its_results(tmp_path, capsys):
    out = tmp_path / "layer.json"
    sizes = json.dumps(TINY).replace('"', "")
    code = main(["bench", "memory", "--subjects", "[sdpa]", "--lengths", "[16]", "--passes", "[forward]",
                 "--sizes", sizes, "--rounds", "2", "--output", str(out)])  # fmt: skip
    assert code == 0, capsys.readouterr().err
    result = json.loads(out.read_text())
    assert result["rows"][0]["subject"] == "sdpa"
    assert result["command"].startswith("titans bench memory")
    assert out.with_suffix(".png").exists()
    assert main(["bench", "memory", "--suite", "gpu"]) == 2
    assert "give one of the three" in capsys.readouterr().err
    assert main(["bench", "speed"]) == 2
    assert "speed" in capsys.readouterr().err
