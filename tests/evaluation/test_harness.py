"""lm-evaluation-harness on a quantized model: the same answers as the model's own logits."""

import json
from importlib.metadata import entry_points

import pytest
import torch

import halfweight

lm_eval = pytest.importorskip("lm_eval")

TASK = """task: families
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}]
"""
QUESTIONS = ("Happy families are", "Every unhappy family is", "All alike are", "In its own")
CHOICES = ("alike", "unhappy")


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    rows = [{"question": q, "choices": CHOICES, "label": i % 2} for i, q in enumerate(QUESTIONS)]
    data = tmp_path / "families.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "families.yaml").write_text(TASK.format(data=data))
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def test_a_local_task_is_answered_as_by_the_models_logits(pair, tasks):
    from transformers import AutoTokenizer

    from halfweight.evaluation.harness import HalfweightLM

    _, out, _ = pair
    found = lm_eval.simple_evaluate(
        model=HalfweightLM(out), tasks=["families"], task_manager=tasks, bootstrap_iters=0
    )
    model = halfweight.load(out)
    tokenizer = AutoTokenizer.from_pretrained(out)

    def likelihood(question, choice):
        start = len(tokenizer(question)["input_ids"])
        ids = torch.tensor([tokenizer(f"{question} {choice}")["input_ids"]])
        with torch.no_grad():
            log_probabilities = model(ids).logits[0, :-1].float().log_softmax(-1)
        return float(log_probabilities.gather(-1, ids[0, 1:, None])[start - 1 :].sum())

    samples = found["samples"]["families"]
    assert len(samples) == len(QUESTIONS)
    for sample, question in zip(samples, QUESTIONS, strict=True):
        expected = [likelihood(question, choice) for choice in CHOICES]
        got = [response[0][0] for response in sample["resps"]]
        assert got == pytest.approx(expected, rel=1e-2)
    assert 0 <= found["results"]["families"]["acc,none"] <= 1


def test_the_entry_point_names_the_class():
    from halfweight.evaluation.harness import HalfweightLM

    points = entry_points(group="lm_eval.models", name="halfweight")
    assert [point.load() for point in set(points)] == [HalfweightLM]
