"""lm-evaluation-harness on a quantized model: the same answers as the model's own logits."""

import json
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from byte_tokenizer import make_tokenizer
from command_line import run
from tiny import make_llama

import halfweight
from halfweight.errors import CheckpointError, UsageError

lm_eval = pytest.importorskip("lm_eval")

COMMON = """task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
TASKS = {
    "families": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
""",
    "whole_texts": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
""",
    "answers": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "alike"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
QUESTIONS = ("Happy families are", "Every unhappy family is", "All alike are", "In its own")
CHOICES = ("alike", "unhappy")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("harness")
    source = make_llama(root / "source", tied=request.param)
    make_tokenizer().save_pretrained(source)
    halfweight.quantize(source, root / "int8")
    return root / "int8"


@pytest.fixture
def task_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    rows = [{"question": q, "choices": CHOICES, "label": i % 2} for i, q in enumerate(QUESTIONS)]
    data = tmp_path / "families.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(COMMON.format(task=name, data=data) + task)
    return tmp_path


def ask(lm, task_folder, *tasks):
    """The samples of each task, by name."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=lm, tasks=list(tasks), task_manager=manager, bootstrap_iters=0
    )
    return found["samples"]


def likelihood(model, start, ids):
    """Log of the chance of ids[start:] after what precedes them."""
    ids = torch.tensor([ids])
    with torch.no_grad():
        log_probabilities = model(ids).logits[0, :-1].float().log_softmax(-1)
    return float(log_probabilities.gather(-1, ids[0, 1:, None])[start - 1 :].sum())


def test_choices_texts_and_answers_are_those_of_the_models_logits(folder, task_folder):
    from halfweight.evaluation.harness import HalfweightLM

    lm = HalfweightLM(folder, device="cpu", max_context=256)
    samples = ask(lm, task_folder, "families", "whole_texts", "answers")
    lm.engine.close()
    model, tokenizer = halfweight.load(folder), make_tokenizer()
    for sample, question in zip(samples["families"], QUESTIONS, strict=True):
        start = len(tokenizer(question)["input_ids"])
        expected = [
            likelihood(model, start, tokenizer(f"{question} {choice}")["input_ids"])
            for choice in CHOICES
        ]
        assert [r[0][0] for r in sample["resps"]] == pytest.approx(expected, rel=1e-2)
    for sample, question in zip(samples["whole_texts"], QUESTIONS, strict=True):
        ids = [tokenizer.eos_token_id, *tokenizer(question)["input_ids"]]
        assert sample["resps"][0][0] == pytest.approx(likelihood(model, 1, ids), rel=1e-2)
    for sample, question in zip(samples["answers"], QUESTIONS, strict=True):
        ids = torch.tensor([tokenizer(question)["input_ids"]])
        made = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=0)
        text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert sample["resps"][0][0].strip() == text.split("\n")[0].strip()


def test_a_text_longer_than_the_context_is_scored_in_windows(folder):
    from lm_eval.api.instance import Instance

    from halfweight.evaluation.harness import HalfweightLM

    lm = HalfweightLM(folder, device="cpu", max_context=32)
    text = " ".join(QUESTIONS)
    (found,) = lm.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True
    )
    lm.engine.close()
    model, ids = halfweight.load(folder), make_tokenizer()(text)["input_ids"]
    assert len(ids) > 2 * 32
    expected = 0.0
    for begin in range(0, len(ids), 31):
        window = ids[begin : begin + 31]
        if begin + 31 > len(ids):  # the harness fills the last window with what precedes it
            window = ids[-31:]
        context = ids[len(ids) - 32] if begin + 31 > len(ids) else ids[begin - 1] if begin else 0
        new = min(31, len(ids) - begin)
        expected += likelihood(model, 32 - new, [context, *window])
    assert found == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("loaded", ["by its name", "by load"])
def test_the_harnesss_own_transformers_model_gives_the_same(folder, task_folder, loaded):
    """`lm_eval --model hf --model_args pretrained=OUT` after `import halfweight`; it ties again."""
    from lm_eval.models.huggingface import HFLM

    from halfweight.evaluation.harness import HalfweightLM

    ours = HalfweightLM(folder, device="cpu", max_context=256)
    expected = ask(ours, task_folder, "families")["families"]
    ours.engine.close()
    model = str(folder) if loaded == "by its name" else halfweight.load(folder)
    theirs = HFLM(pretrained=model, tokenizer=str(folder), device="cpu", batch_size=1)
    found = ask(theirs, task_folder, "families")["families"]
    for one, other in zip(found, expected, strict=True):
        scores = [[r[0][0] for r in sample["resps"]] for sample in (one, other)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-2)


@pytest.mark.parametrize("name", ["hf", "halfweight"])
def test_the_harnesss_own_command_line(pair, task_folder, name):
    """The command of docs/evaluate.md, in a process of its own."""
    page = (Path(__file__).parents[2] / "docs/evaluate.md").read_text()
    start = page.index("python -c 'import halfweight")
    words = shlex.split(page[start : page.index("\n    #", start)].replace("\\\n", ""))
    given = {"python": sys.executable, "hf": name, "arc_easy": "families"}
    words = [given.get(word, word).replace("=OUT", f"={pair[1]}") for word in words]
    words += ["--device", "cpu", "--include_path", str(task_folder), "--limit", "2"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|families|" in done.stdout.replace(" ", "")


def test_its_name_is_registered():
    from lm_eval.api.registry import get_model

    from halfweight.evaluation.harness import HalfweightLM

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    point = project["entry-points"]["lm_eval.models"]["halfweight"]
    assert point == f"{HalfweightLM.__module__}:{HalfweightLM.__name__}"
    assert get_model("halfweight") is HalfweightLM


def test_an_option_that_the_engine_does_not_have_is_refused(folder):
    from lm_eval.api.instance import Instance

    from halfweight.evaluation.harness import HalfweightLM

    lm = HalfweightLM(folder, device="cpu", max_context=64)
    request = Instance("generate_until", {}, ("Happy", {"until": [], "num_beams": 4}), 0)
    with pytest.raises(UsageError, match="unknown option 'num_beams'"):
        lm.generate_until([request], disable_tqdm=True)
    lm.engine.close()


def test_a_folder_without_a_tokenizer_is_refused(folder):
    from halfweight.evaluation.harness import HalfweightLM

    engine = halfweight.Engine(halfweight.load(folder), max_context=64)
    with pytest.raises(CheckpointError, match="the folder has no tokenizer"):
        HalfweightLM(engine)
    engine.close()


def test_the_command_prints_the_scores(capsys, pair, task_folder):
    words = ("evaluate", str(pair[1]), "--tasks", "families, answers")
    words = (*words, "--include-path", str(task_folder), "--limit", "2")
    code, output, err = run(capsys, *words, "--json")
    assert code == 0, err
    by_task = {score["task"]: score for score in json.loads(output)}
    assert by_task.keys() == {"families", "answers"}
    assert by_task["families"]["metric"] == "acc"
    assert by_task["families"]["value"] in (0.0, 0.5, 1.0)
    assert by_task["families"]["num_samples"] == 2
    code, output, _ = run(capsys, *words)
    assert code == 0
    assert "families" in output
    assert "exact_match" in output


def test_a_task_that_is_not_known_is_refused(capsys, pair):
    code, output, err = run(capsys, "evaluate", str(pair[1]), "--tasks", "no_such_task")
    assert code == 2
    assert not output
    assert "task 'no_such_task' is not known to lm-evaluation-harness" in err
    assert "hint: " in err


def test_data_that_cannot_be_had_is_one_line(capsys, pair, task_folder):
    (task_folder / "families.jsonl").unlink()
    words = ("--tasks", "families", "--include-path", str(task_folder))
    code, _, err = run(capsys, "evaluate", str(pair[1]), *words)
    assert code == 1
    assert "the data of families cannot be had: " in err
    assert "Traceback" not in err
