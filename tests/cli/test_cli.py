"""The commands, from their arguments to their messages."""

import importlib.metadata
import io
import json
import re
import shutil
import subprocess
import sys

import pytest

from titans.cli import COMMANDS, main
from titans.tasks import TASKS

TINY = ["--model", '{"type": "sliding_llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}']
SHORT = [
    "--training.length",
    "32",
    "--training.batch_size",
    "4",
    "--training.tokens",
    "1e3",
    "--evaluation.sample",
    "5",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text("one line after another\n" * 300)
    assert main(["train", "--data", str(folder / "text.txt"), "--output", str(folder / "run"), *TINY, *SHORT]) == 0
    return folder / "run"


def test_train_reports_and_fills_its_folder(run, capsys):
    assert (run / "model.safetensors").exists()
    assert main(["train", "--resume", str(run)]) == 0  # a finished run: measured again, trained no further
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("gzip", "xz", "memory carried", "A sample", "loss.png"))
    assert main(["train", "--output", str(run), *TINY]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_a_config_file_and_options_on_top(run, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text((run / "config.yaml").read_text())
    arguments = ["train", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "run"), "--training.seed", "7"]
    assert main(arguments) == 0
    assert "seed: 7" in (tmp_path / "run" / "config.yaml").read_text()


def test_generate(run, capsys, monkeypatch, tmp_path):
    assert main(["generate", str(run), "--prompt", "one line", "--max-new-tokens", "5"]) == 0
    greedy = capsys.readouterr().out
    assert greedy.startswith("one line")
    (tmp_path / "prompt.txt").write_text("one line")
    assert main(["generate", str(run), "--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == greedy
    monkeypatch.setattr(sys, "stdin", io.StringIO("one line"))
    sampled = ["--temperature", "0.9", "--top-k", "20", "--top-p", "0.9", "--max-new-tokens", "5"]
    assert main(["generate", str(run), "--prompt-file", "-", *sampled]) == 0
    assert main(["generate", str(run), "--max-new-tokens", "5"]) == 0


def test_eval(run, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("something else\n" * 30)
    options = ["--data", str(tmp_path / "other.txt"), "--lengths", "[16]", "--json", str(tmp_path / "o.json")]
    assert main(["eval", "language", str(run), *options]) == 0
    assert "anew every 16" in capsys.readouterr().out
    assert json.loads((tmp_path / "o.json").read_text())["bytes"] == 450


def test_a_copied_run_without_its_tokenizer(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("tokenizer*"))
    for command in (["eval", "language", str(copy)], ["generate", str(copy)]):
        assert main(command) == 2
        assert "its tokenizer's files were left behind" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "did you mean 'train'"),
        (["train", "--training.tokns", "3"], "did you mean 'training.tokens'"),
        (["train", "--training.tokens", "many"], "training.tokens"),
        (["train", "--model.hiden_size", "3"], "hidden_size"),
        (["train", "--task", "langage"], "use 'language'"),
        (["train", "--data", "missing.txt"], "does not exist"),
        (["train", "missing.yaml"], "missing.yaml does not exist"),
        (["train", "--resume", "nowhere"], "no config.yaml"),
        (["train", "--resume"], "needs a value"),
        (["generate", "nowhere"], "no model.safetensors"),
        (["eval", "langage", "nowhere"], "use 'language'"),
        (["eval", "language", "nowhere"], "no model.safetensors"),
        (["compare", "nowhere.yaml"], "does not exist"),
    ],
)
def test_mistakes_get_one_message_and_exit_code_two(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_bad_key_in_a_file(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("training:\n  lenght: 3\n")
    assert main(["train", str(tmp_path / "bad.yaml")]) == 2
    assert "did you mean 'training.length'" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert re.search(rf"\nexamples:\n  .*titans {command}\b", capsys.readouterr().out)


def test_the_version_is_the_installed_one(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"titans {importlib.metadata.version('titans')}\n"


def test_help_imports_nothing_heavy():
    code = "import sys, titans.cli; titans.cli.main(['--help']); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "titans train" in out
    assert out.strip().endswith("False")


@pytest.mark.parametrize("task", TASKS)
def test_options_of_a_task_import_no_torch(task):
    code = (
        "import sys, titans.cli\n"
        "for command in (['train', '--task', sys.argv[1], '--help'], ['eval', sys.argv[1], '--help']):\n"
        "    try: titans.cli.main(command)\n"
        "    except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code, task], capture_output=True, text=True, check=True).stdout
    assert "--training.tokens" in out
    assert "titans eval " + task in out
    assert out.strip().endswith("False")


@pytest.mark.parametrize("written", [["--lengths", "16", "24"], ["--lengths", "[16, 24]"], ["--lengths=[16,24]"]])
def test_lists_are_words_or_in_brackets(run, written, tmp_path, capsys):
    out = tmp_path / "o.json"
    assert main(["eval", "language", *written, "--json", str(out), "--sample", "0", "--", str(run)]) == 0
    assert list(json.loads(out.read_text())["windows"]) == ["16", "24", "whole"]
    assert out.with_suffix(".png").exists()


def test_the_harness_without_its_package_names_the_extra(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "titans.training.harness", raising=False)
    assert main(["eval", "harness", str(run), "--tasks", "niah_single_1"]) == 2
    assert "titans[harness]" in capsys.readouterr().err
