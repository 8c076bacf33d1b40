"""llama.cpp's greedy continuation of texts; run by the Python that has llama-cpp-python.

Reads JSON {"path", "texts", "new_tokens"} from stdin; writes, for each text, {"ids", "new",
"text", "logits"}: its tokens as llama.cpp cuts it, the tokens it goes on with, their text, and the
logits after the text.
"""

import ctypes
import json
import sys

import llama_cpp
import numpy as np

CONTEXT = 256


def main():
    asked = json.load(sys.stdin)
    llama_cpp.llama_log_set(SILENT, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.use_extra_bufts = False  # weights packed for AMX end SmolLM2 with a crash in 0.3.36
    model = llama_cpp.llama_model_load_from_file(asked["path"].encode(), options)
    if not model:
        raise SystemExit("llama.cpp cannot load the file")
    answers = [continued(model, text, asked["new_tokens"]) for text in asked["texts"]]
    print(json.dumps(answers))


@llama_cpp.llama_log_callback
def SILENT(level, text, data):
    pass


def continued(model, text, new_tokens):
    vocab = llama_cpp.llama_model_get_vocab(model)
    ids, new = tokenized(vocab, text), []
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = CONTEXT
    parameters.n_threads = parameters.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, parameters)
    size = llama_cpp.llama_vocab_n_tokens(vocab)
    tokens, first = ids, None
    for _ in range(new_tokens):
        room = (llama_cpp.llama_token * len(tokens))(*tokens)
        batch = llama_cpp.llama_batch_get_one(room, len(tokens))
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama.cpp cannot decode")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (size,))
        first = logits.tolist() if first is None else first
        tokens = [int(logits.argmax())]
        new += tokens
    llama_cpp.llama_free(context)
    return {"ids": ids, "new": new, "text": text_of(vocab, new), "logits": first}


def tokenized(vocab, text):
    raw = text.encode()
    room = (llama_cpp.llama_token * CONTEXT)()
    count = llama_cpp.llama_tokenize(vocab, raw, len(raw), room, CONTEXT, True, True)
    return list(room[:count])


def text_of(vocab, tokens):
    room = ctypes.create_string_buffer(256)
    raw = b""
    for token in tokens:
        size = llama_cpp.llama_token_to_piece(vocab, token, room, 256, 0, True)
        raw += room.raw[:size]
    return raw.decode(errors="replace")


if __name__ == "__main__":
    main()
