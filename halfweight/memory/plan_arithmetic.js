"use strict";
// The planner's arithmetic (plan.py) for the page. A test compares the two over a grid.
// Sizes are whole bytes below 2^53, so every sum is exact.

const WEIGHT_PARTS = ["int8 data", "scales", "16-bit weights"];

function ceilDiv(a, b) {
  const top = a + b - 1;
  return (top - (top % b)) / b;
}

function runtimeOn(model, ranks) {
  return model.runtime === "halfweight" && ranks > 1 ? "vllm" : model.runtime;
}

function kvParts(model, work) {
  const vllm = runtimeOn(model, work.ranks) === "vllm";
  const states = model.layers.reduce((sum, l) => sum + l.count * l.state_bytes, 0);
  const parts = new Map([
    ["KV cache", { name: "KV cache", sharded: 0, replicated: 0 }],
    ["KV cache, states", { name: "KV cache, states", sharded: 0, replicated: work.batch * states }],
  ]);
  for (const layer of model.layers) {
    const heads = ceilDiv(layer.heads, work.ranks);
    const numbers = ((layer.numbers - (layer.numbers % layer.heads)) / layer.heads) * heads;
    let each = 2 * numbers;
    if (work.kvDtype === "int8" && layer.window === null) {
      each = vllm ? numbers : numbers + 4 * heads;
    }
    const tokens = layer.window === null ? work.context : Math.min(work.context, layer.window);
    const bytes = work.batch * layer.count * each * tokens;
    const name = "KV cache" + layer.kind;
    const part = parts.get(name) ?? { name, sharded: 0, replicated: 0 };
    part[work.ranks > 1 && layer.heads > 1 ? "sharded" : "replicated"] += bytes;
    parts.set(name, part);
  }
  return [...parts.values()];
}

function mlpNumbers(a, width) {
  if (a.experts_per_token) return 4 * a.hidden + a.experts_per_token * (4 * width + a.hidden);
  return 4 * a.hidden + (a.fused_mlp ? 4 : 3) * width;
}

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
    const windows = new Set(model.layers.filter((l) => l.numbers > 0).map((l) => l.window));
    if (windows.size === 0) windows.add(null);
    const reaches = [...windows].map((window) =>
      window === null ? work.context : Math.min(work.context, window + length));
    masks = reaches.map((reach) => tokens * reach);
    const layer = 4 * work.batch * Math.max(...reaches) * a.head_dim;
    if (heads > kvHeads && length > 1) attention += layer * heads;
    if (work.kvDtype === "int8") attention += layer * kvHeads;
  }
  const mask = masks.reduce((sum, one) => sum + one, 0);
  const mlp = mask + 2 * tokens * mlpNumbers(a, width);
  const norm = mask + tokens * 18 * a.hidden;
  return Math.max(mlp, norm, mask + attention + 2 * Math.max(...masks));
}

// transient.py: what products of one stream keep.
function workspaceBytes(model, work, weights) {
  const ours = weights === "int8" && runtimeOn(model, work.ranks) === "halfweight";
  return model.constants.CUBLAS_WORKSPACE_BYTES + (ours ? partialSumsBytes(model) : 0);
}

function partialSumsBytes(model) {
  return 4 * model.constants.MULTIPROCESSORS * model.constants.PARTIAL_SUMS;
}

function stepBytes(model, work) {
  const { architecture: a, constants: c } = model;
  const queries = a.heads * a.head_dim;
  const qkv = queries + 2 * a.kv_heads * a.head_dim;
  const programs = work.batch * a.kv_heads;
  const wanted = Math.floor((c.PROGRAMS_A_PROCESSOR * c.MULTIPROCESSORS) / programs);
  const splits = Math.max(1, Math.min(wanted, ceilDiv(work.context, c.SPLIT_TOKENS)));
  const partials = 4 * work.batch * a.heads * splits * (a.head_dim + 2);
  const attention = 2 * work.batch * (3 * a.hidden + qkv + queries) + partials;
  const head = 6 * work.batch * (a.hidden + a.vocabulary);
  return Math.max(attention, head);
}

// Whether gpu_step.py takes the model.
function hasOwnStep(model, work, weights) {
  const ours = weights === "int8" && runtimeOn(model, work.ranks) === "halfweight";
  return model.device === "cuda" && ours && model.ownStep[work.groupSize];
}

// transient.py: a prompt read by our own kernels.
function ownPrefillBytes(model, work) {
  const a = model.architecture;
  const tokens = Math.min(work.context, model.constants.CHUNK_TOKENS);
  const mlp = 3 * a.hidden + 3 * a.intermediate;
  const attention = 3 * a.hidden + 3 * a.heads * a.head_dim + 2 * a.kv_heads * a.head_dim;
  return 2 * tokens * Math.max(mlp, attention) + 4 * work.context * a.head_dim;
}

function decodeBytes(model, work, weights) {
  if (!hasOwnStep(model, work, weights)) {
    const logits = 6 * work.batch * model.architecture.vocabulary;
    return forwardPeak(model, 1, work) + logits + workspaceBytes(model, work, weights);
  }
  const tables = 4 * work.context * model.architecture.head_dim;
  return tables + partialSumsBytes(model) + stepBytes(model, work);
}

// What comes and goes: prefill's, and what a decode step takes beyond.
function passingParts(model, work, weights) {
  const { architecture: a, constants: c } = model;
  const held = runtimeOn(model, work.ranks) === "vllm" ? 0 : c.TOKEN_BYTES;
  const chunk = Math.max(1, Math.floor(c.CHUNK_TOKENS / work.batch));
  const alone = work.batch === 1 && work.kvDtype === "16bit" && hasOwnStep(model, work, weights);
  const forward = alone ? ownPrefillBytes(model, work)
    : forwardPeak(model, Math.min(work.context, chunk), work);
  const prefill = held * work.batch * work.context + forward;
  const onGpu = model.device === "cuda";
  const decode = onGpu ? decodeBytes(model, work, weights) : 0;
  return [
    ["logits", 6 * work.batch * a.vocabulary],
    ["prefill activations", prefill],
    ["decode step", Math.max(0, decode - prefill)],
    ["kernel workspace", onGpu ? workspaceBytes(model, work, weights) : 0],
  ].map(([name, replicated]) => ({ name, sharded: 0, replicated }));
}

function footprint(model, work, weights) {
  const sums = model.weights[runtimeOn(model, work.ranks)];
  const [divided, held] = weights === "16bit" ? sums["16bit"] : sums.int8[work.groupSize];
  const parts = WEIGHT_PARTS.map((name, i) =>
    work.ranks > 1
      ? { name, sharded: ceilDiv(divided[i], work.ranks), replicated: held[i] }
      : { name, sharded: 0, replicated: divided[i] + held[i] });
  const passing = passingParts(model, work, weights);
  parts.push(...kvParts(model, work), ...passing);
  const found = parts.filter((part) => part.sharded + part.replicated > 0);
  const sum = (list) => list.reduce((all, part) => all + part.sharded + part.replicated, 0);
  const allocated = sum(found);
  const runtime = runtimeOn(model, work.ranks);
  const { low, likely, high } = model.process[runtime];
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
