"""vLLM in a process of its own, as it cannot be started twice in one.

`python vllm_run.py QUESTION` is that process: QUESTION is a JSON of {folder, prompts, new_tokens,
options}, and it prints one line `RESULT <json>`: for each prompt of ids the greedy tokens, their
log-probabilities, and those of the prompt's own tokens.
"""

import json
import os
import subprocess
import sys

MINUTES = 60


class VllmDiedError(Exception):
    """vLLM ended without an answer; the message is its log."""


def run_vllm(folder, prompts, new_tokens=12, environment=None, **options):
    """vLLM's answers, as above, and its log; `options` are those of vllm.LLM."""
    question = {
        "folder": str(folder),
        "prompts": prompts,
        "new_tokens": new_tokens,
        "options": {"dtype": "float32", "enforce_eager": True} | options,
    }
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(question)],
        env=_environment(options.get("tensor_parallel_size", 1)) | (environment or {}),
        capture_output=True,
        text=True,
        timeout=9 * MINUTES,
    )
    log = done.stdout + done.stderr
    answers = [line for line in log.splitlines() if line.startswith("RESULT ")]
    if not answers:
        raise VllmDiedError(log)
    return json.loads(answers[0].removeprefix("RESULT ")), log


def _environment(num_workers):
    """One thread a worker: two cores are enough, and sums are added in one order."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(num_workers))),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def main():
    from vllm import LLM, SamplingParams

    question = json.loads(sys.argv[1])
    llm = LLM(
        question["folder"],
        skip_tokenizer_init=True,
        max_num_seqs=4,
        max_model_len=256,
        seed=0,
        **question["options"],
    )
    sampling = SamplingParams(
        temperature=0,
        max_tokens=question["new_tokens"],
        logprobs=1,
        prompt_logprobs=0,
        detokenize=False,
        ignore_eos=True,
    )
    prompts = [{"prompt_token_ids": ids} for ids in question["prompts"]]
    found = [_answer(output) for output in llm.generate(prompts, sampling, use_tqdm=False)]
    print("RESULT", json.dumps(found), flush=True)


def _answer(output):
    (written,) = output.outputs
    ids = list(written.token_ids)
    prompt = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return {
        "ids": ids,
        "logprobs": [at[i].logprob for at, i in zip(written.logprobs, ids, strict=True)],
        "prompt_logprobs": [at[i].logprob for i, at in prompt],
    }


if __name__ == "__main__":
    main()
