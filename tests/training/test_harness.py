"""The lm-evaluation-harness over our models, offline."""

import json

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from titans.cli import main
from titans.tasks import get_task
from titans.training.config import parse_config
from titans.training.harness import Harness, harness_task, run_harness
from titans.training.models import build_model
from titans.training.questions import Question
from titans.training.run import train
from titans.training.tokens import byte_tokenizer

BYTES = byte_tokenizer()
MODEL = {"variant": "lmm", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_memory_heads": 1,
         "memory_expansion": 1, "chunk_size": 16}  # fmt: skip


@pytest.fixture
def model():
    return build_model({"type": "titans", **MODEL}, vocab_size=258, eos_token_id=256, pad_token_id=257).eval()


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_generation_is_greedy_up_to_a_stop_word(model):
    harness = Harness(model, BYTES)
    whole = harness.generate_until([request("generate_until", "Once upon", {"max_gen_toks": 12, "until": []})])[0]
    ids = torch.tensor([list(b"Once upon")])
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, 9:]
    assert whole == BYTES.decode(expected, skip_special_tokens=True)
    stop = whole[3]
    cut = harness.generate_until([request("generate_until", "Once upon", {"max_gen_toks": 12, "until": [stop]})])[0]
    assert cut == whole[: whole.index(stop)]


def test_likelihoods_are_the_model_s(model):
    (nats, _), = Harness(model, BYTES).loglikelihood([request("loglikelihood", "Once", " upon")])  # fmt: skip
    ids = torch.tensor([list(b"Once upon")])
    with torch.no_grad():
        log_p = model(ids).logits[0].log_softmax(-1)
    assert nats == pytest.approx(sum(float(log_p[i - 1, ids[0, i]]) for i in range(4, 9)), abs=1e-3)


def test_questions_are_tasks_with_their_own_score(model):
    written = Harness(model, BYTES).generate_until([request("generate_until", "Well?", {"max_gen_toks": 4})])[0]
    questions = [Question("Well?", "", (written, "never"), (0.0, 0.0)), Question("Well?", "", (written,), (0.0,))]
    results = run_harness(model, BYTES, [harness_task("well", questions, 4)], None)
    assert results["well"]["accuracy,none"] == pytest.approx(75.0)
    with pytest.raises(ValueError, match=r"tasks=\['no_such_task'\] are unknown"):
        run_harness(model, BYTES, ["no_such_task"], None)


def test_the_command(tmp_path, capsys):
    (tmp_path / "nounlist.txt").write_text("house\n")
    (tmp_path / "adjectivelist.txt").write_text("blue\n")
    values = {"output": str(tmp_path / "run"), "model": MODEL, "data": {"words": str(tmp_path)},
              "training": {"length": 600, "batch_size": 1, "tokens": 600}}  # fmt: skip
    task = get_task("needle")
    train(parse_config(task, values), task, evaluate=False, progress=False)
    command = ["eval", "harness", str(tmp_path / "run"), "--tasks", "niah_single_1", "--lengths", "700", "800"]
    command += ["--samples", "2", "--words", str(tmp_path), "--json", str(tmp_path / "o.json")]
    assert main(command) == 0
    assert "| niah_single_1 @ 700 | accuracy |" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "o.json").read_text())) == {"niah_single_1 @ 700", "niah_single_1 @ 800"}
