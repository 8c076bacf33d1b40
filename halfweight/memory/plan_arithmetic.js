"use strict";
// The planner's arithmetic (plan.py) for the page. A test compares the two over a grid.
// Sizes are whole bytes below 2^53, so every sum is exact.

const WEIGHT_PARTS = ["int8 data", "scales", "16-bit weights"];

function ceilDiv(a, b) {
  const top = a + b - 1;
  return (top - (top % b)) / b;
}

function runtimeOn(model, ranks) {
  return model.runtime === "halfweight" && ranks > 1 && !model.isShared ? "vllm" : model.runtime;
}

// What makes the file and runs it; none where no command of ours does, or the file is another.
function commands(model, work) {
  const { quantize, folder, madeInGroupsOf, gpuShare } = model.commands;
  const runtime = runtimeOn(model, work.ranks);
  if (runtime === "transformers-tp") return [];
  if (madeInGroupsOf !== null && madeInGroupsOf !== work.groupSize) return [];
  const made = quantize === null ? [] : [quantize[runtime][work.groupSize]];
  const serve = runtime === "vllm" ? vllmServe(folder, work, gpuShare) : ownServe(folder, work);
  return [...made, serve];
}

function ownServe(folder, { context, batch, ranks, kvDtype }) {
  const words = [`halfweight serve ${folder} --max-context ${context} --max-sequences ${batch}`];
  if (ranks > 1) words.push(`--tensor-parallel ${ranks}`);
  if (kvDtype === "int8") words.push("--kv-cache int8");
  return words.join(" ");
}

function vllmServe(folder, { context, batch, ranks, kvDtype }, share) {
  const words = [`vllm serve ${folder} --tensor-parallel-size ${ranks} --max-model-len ${context}`];
  words.push(`--max-num-seqs ${batch} --gpu-memory-utilization ${share}`);
  if (kvDtype === "int8") words.push("--kv-cache-dtype fp8");
  return words.join(" ");
}

// Which of the engine's runners takes the model; null where another engine runs it.
function runnerOf(model, work, weights) {
  if (runtimeOn(model, work.ranks) !== "halfweight") return null;
  return weights === "int8" ? model.runners[work.groupSize] : "transformers";
}

function kvParts(model, work, weights) {
  const runner = runnerOf(model, work, weights);
  const states = model.layers.reduce((sum, l) => sum + l.count * l.state_bytes, 0);
  const parts = new Map([
    ["KV cache", { name: "KV cache", sharded: 0, replicated: 0 }],
    ["KV cache, states", { name: "KV cache, states", sharded: 0, replicated: work.batch * states }],
  ]);
  for (const layer of model.layers) {
    const each = runner === null
      ? otherLayerBytes(model, work, layer)
      : layerBytes(ownLayer(layer, work.ranks), work, runner) * pageSlots(model, work, runner);
    const name = "KV cache" + layer.kind;
    const part = parts.get(name) ?? { name, sharded: 0, replicated: 0 };
    part[work.ranks > 1 && layer.heads > 1 ? "sharded" : "replicated"] += layer.count * each;
    parts.set(name, part);
  }
  return [...parts.values()];
}

// What a rank holds of a layer's heads.
function ownLayer(layer, ranks) {
  const heads = ceilDiv(layer.heads, ranks);
  const numbers = ((layer.numbers - (layer.numbers % layer.heads)) / layer.heads) * heads;
  return { ...layer, heads, numbers };
}

// tensor_parallel.py: the model with the sizes of a rank of ours.
function ownModel(model, ranks) {
  const a = model.architecture;
  const own = {
    heads: Math.floor(a.heads / ranks),
    kv_heads: Math.max(1, Math.floor(a.kv_heads / ranks)),
    intermediate: Math.floor(a.intermediate / ranks),
  };
  return { ...model, architecture: { ...a, ...own } };
}

function pageSlots(model, work, runner) {
  const size = model.constants.PAGE_TOKENS[runner];
  return size * (1 + work.batch * ceilDiv(work.context, size));
}

function layerBytes(layer, work, runner) {
  if (work.kvDtype === "16bit") return 2 * layer.numbers;
  return layer.numbers + (layer.numbers ? 2 * (runner === "cpu" ? 4 : 2) * layer.heads : 0);
}

function otherLayerBytes(model, work, layer) {
  const heads = ceilDiv(layer.heads, work.ranks);
  const numbers = ((layer.numbers - (layer.numbers % layer.heads)) / layer.heads) * heads;
  let each = 2 * numbers;
  if (work.kvDtype === "int8" && layer.window === null) {
    each = runtimeOn(model, work.ranks) === "vllm" ? numbers : numbers + 4 * heads;
  }
  const tokens = layer.window === null ? work.context : Math.min(work.context, layer.window);
  return work.batch * each * tokens;
}

function mlpNumbers(a, width) {
  if (a.experts_per_token) return 4 * a.hidden + a.experts_per_token * (4 * width + a.hidden);
  return 4 * a.hidden + (a.fused_mlp ? 4 : 3) * width;
}

// transient.py: tokens that attention sees, for each kind of layer.
function reaches(model, length, context) {
  const windows = new Set(model.layers.filter((l) => l.numbers > 0).map((l) => l.window));
  if (windows.size === 0) windows.add(null);
  return [...windows].map((window) =>
    window === null ? context : Math.min(context, window + length));
}

// transient.py: another engine's forward pass over `length` tokens of each sequence.
function forwardPeak(model, length, work) {
  const a = model.architecture;
  const heads = ceilDiv(a.heads, work.ranks);
  const kvHeads = ceilDiv(a.kv_heads, work.ranks);
  const tokens = work.batch * length;
  const width = ceilDiv(a.intermediate, work.ranks);
  let numbers = 3 * a.hidden + 2 * (heads + kvHeads) * a.head_dim;
  if (a.fused_attention) numbers += (heads + 2 * kvHeads) * a.head_dim;
  let attention = 2 * tokens * numbers;
  let masks = [0];
  if (runtimeOn(model, work.ranks) !== "vllm") {
    const seen = reaches(model, length, work.context);
    masks = seen.map((reach) => tokens * reach);
    const layer = 4 * work.batch * Math.max(...seen) * a.head_dim;
    if (heads > kvHeads && length > 1) attention += layer * heads;
    if (work.kvDtype === "int8") attention += layer * kvHeads;
  }
  const mask = masks.reduce((sum, one) => sum + one, 0);
  const mlp = mask + 2 * tokens * mlpNumbers(a, width);
  const norm = mask + tokens * 18 * a.hidden;
  return Math.max(mlp, norm, mask + attention + 2 * Math.max(...masks));
}

// transient.py: the engine's step through transformers' forward.
function rowBytes(model, tokens, work) {
  const a = model.architecture;
  let numbers = 3 * a.hidden + 2 * (a.heads + a.kv_heads) * a.head_dim;
  if (a.fused_attention) numbers += (a.heads + 2 * a.kv_heads) * a.head_dim;
  let attention = 2 * tokens * numbers;
  if (model.device === "cpu") {
    const length = Math.min(tokens, work.context);
    const reach = Math.max(...reaches(model, length, work.context));
    attention += reach * (4 * a.kv_heads * a.head_dim + 3 * length);
  }
  return Math.max(2 * tokens * mlpNumbers(a, a.intermediate), 18 * tokens * a.hidden, attention);
}

// transient.py: what products of one stream keep.
function workspaceBytes(model, work, weights) {
  const ours = weights === "int8" && runtimeOn(model, work.ranks) === "halfweight";
  return model.constants.CUBLAS_WORKSPACE_BYTES + (ours ? partialSumsBytes(model) : 0);
}

function partialSumsBytes(model) {
  return 4 * model.constants.MULTIPROCESSORS * model.constants.PARTIAL_SUMS;
}

function powerOfTwo(number) {
  let found = 1;
  while (found < number) found *= 2;
  return found;
}

// engine_memory.py, from here to rowParts.
function bucket(c, batch) {
  const small = c.SMALL_BUCKETS.find((size) => batch <= size);
  return small ?? ceilDiv(batch, c.BUCKET_STEP) * c.BUCKET_STEP;
}

function activationBytes(a, tokens) {
  const queries = a.heads * a.head_dim;
  const qkv = queries + 2 * a.kv_heads * a.head_dim;
  return 2 * tokens * (3 * a.hidden + Math.max(qkv + 2 * queries, 3 * a.intermediate));
}

function gpuParts(model, work) {
  const { architecture: a, constants: c } = model;
  const { batch, context } = work;
  const pages = ceilDiv(context, c.PAGE_TOKENS.gpu);
  const rows = Math.max(bucket(c, batch), c.FEW_SEQUENCES * c.FEW_TOKENS);
  const tokens = Math.min(c.STEP_TOKENS.gpu, batch * context);
  const reading = work.kvDtype === "int8" ? 0 : Math.min(c.READ_TOKENS, tokens);
  const scratch = work.kvDtype === "int8"
    ? Math.max(pages, 2 * ceilDiv(c.STEP_TOKENS.gpu, c.PAGE_TOKENS.gpu)) : 0;
  const row = 4 * (a.head_dim + 2);
  const group = (a.heads - (a.heads % a.kv_heads)) / a.kv_heads;
  const rowHeads = bucket(c, batch) * a.kv_heads;
  const items = rowHeads + c.DECODE_PROGRAMS[work.kvDtype] * c.MULTIPROCESSORS;
  const tileSums = row * 2 * c.MULTIPROCESSORS * c.TILE_ROWS;
  const decodeSums = row * items * Math.max(c.MIN_DOT_ROWS, powerOfTwo(group)) + 4 * rowHeads;
  return {
    "tables": 4 * (batch + 1) * (context + 1 + pages) + 4 * context * a.head_dim,
    "scratch pages": scratch * 4 * c.PAGE_TOKENS.gpu * a.kv_heads * a.head_dim,
    "step activations": activationBytes(a, tokens) + tileSums,
    "recorded steps": activationBytes(a, Math.max(rows, reading)) + decodeSums
      + (reading ? tileSums : 0) + partialSumsBytes(model),
    "logits": (rows + batch) * 2 * a.vocabulary + gathered(a, rows, work.ranks),
  };
}

function gathered(a, rows, ranks) {
  return ranks === 1 ? 0 : 2 * rows * (Math.floor(a.vocabulary / ranks) + 2 * a.vocabulary);
}

function cpuParts(model, work) {
  const { architecture: a, constants: c } = model;
  const queries = a.heads * a.head_dim;
  const qkv = queries + 2 * a.kv_heads * a.head_dim;
  return {
    "tables": 4 * (work.batch + 1) * (work.context + 1) + 8 * work.context * a.head_dim,
    "step activations": 4 * c.STEP_TOKENS.cpu * (a.hidden + qkv + queries + a.intermediate),
    "logits": 4 * work.batch * a.vocabulary,
  };
}

function rowParts(model, work, weights) {
  const { architecture: a, constants: c } = model;
  const { batch, context } = work;
  const onGpu = model.device === "cuda";
  const padded = powerOfTwo(batch);
  return {
    "tables": 4 * (batch + 1) * (context + 1),
    "step activations":
      rowBytes(model, Math.min(c.STEP_TOKENS.transformers, batch * context), work),
    "recorded steps":
      onGpu ? rowBytes(model, padded, work) + workspaceBytes(model, work, weights) : 0,
    "logits": 2 * a.vocabulary * (onGpu ? batch + padded : 3 * batch),
  };
}

function otherEngineParts(model, work) {
  const chunk = Math.max(1, Math.floor(model.constants.CHUNK_TOKENS / work.batch));
  return {
    "step activations": forwardPeak(model, Math.min(work.context, chunk), work),
    "logits": 6 * work.batch * model.architecture.vocabulary,
  };
}

const PASSING_PARTS = [
  "tables", "scratch pages", "step activations", "recorded steps", "logits", "kernel workspace",
];

function passingParts(whole, work, weights) {
  const runner = runnerOf(whole, work, weights);
  const model = runner === null ? whole : ownModel(whole, work.ranks);
  const sizes = runner === "gpu" ? gpuParts(model, work)
    : runner === "cpu" ? cpuParts(model, work)
    : runner === "transformers" ? rowParts(model, work, weights)
    : otherEngineParts(model, work);
  if (model.device === "cuda") sizes["kernel workspace"] = workspaceBytes(model, work, weights);
  return PASSING_PARTS.map((name) => ({ name, sharded: 0, replicated: sizes[name] ?? 0 }));
}

function processBytes(model, runtime, ranks) {
  const alone = model.process[runtime];
  if (runtime !== "halfweight" || ranks === 1) return alone;
  const plus = (bound) => alone[bound] + model.communication[bound];
  return { low: plus("low"), likely: plus("likely"), high: plus("high") };
}

function footprint(model, work, weights) {
  const sums = model.weights[runtimeOn(model, work.ranks)];
  const [divided, held, kv] = weights === "16bit" ? sums["16bit"] : sums.int8[work.groupSize];
  const holders = Math.min(work.ranks, model.architecture.kv_heads);
  const divide = (rest, ofHeads) => ceilDiv(rest, work.ranks) + ceilDiv(ofHeads, holders);
  const parts = WEIGHT_PARTS.map((name, i) =>
    work.ranks > 1
      ? { name, sharded: divide(divided[i] - kv[i], kv[i]), replicated: held[i] }
      : { name, sharded: 0, replicated: divided[i] + held[i] });
  const passing = passingParts(model, work, weights);
  parts.push(...kvParts(model, work, weights), ...passing);
  const found = parts.filter((part) => part.sharded + part.replicated > 0);
  const sum = (list) => list.reduce((all, part) => all + part.sharded + part.replicated, 0);
  const allocated = sum(found);
  const runtime = runtimeOn(model, work.ranks);
  const { low, likely, high } = processBytes(model, runtime, work.ranks);
  const onAllocator = model.device === "cuda" && runtime === "halfweight";
  const slack = onAllocator ? Math.floor(sum(passing) / model.slackDivisor) : 0;
  const overhead = { low, likely: likely + slack, high: high + slack };
  const total = {};
  for (const bound of ["low", "likely", "high"]) total[bound] = allocated + overhead[bound];
  return { parts: found, allocated, overhead, total };
}

function judge(total, budget) {
  if (total.high <= budget) return "fits";
  return total.likely <= budget ? "tight" : "does not fit";
}
