"""The page of a plan: its arithmetic is Python's, its controls work, it loads nothing."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product

import pytest
from browser import CHROMIUM, NODE, chromium, run_in_page
from command_line import run

from halfweight.memory.architecture import architecture
from halfweight.memory.cards import parse_gpus
from halfweight.memory.commands import commands
from halfweight.memory.named_model import planned_model
from halfweight.memory.plan import Model, footprint, legal_ranks, on_ranks, plan
from halfweight.memory.plan_page import page_data, render
from halfweight.memory.presets import preset
from halfweight.memory.what_fits import with_group_size
from halfweight.memory.workload import Range, Workload
from halfweight.quantization.scheme import Recipe, Scheme

CARD = parse_gpus("24GB")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")
needs_node = pytest.mark.skipif(NODE is None, reason="needs node on the PATH")
LATENT = {**preset("llama-3-8b"), "kv_lora_rank": 512, "qk_rope_head_dim": 64}
MODELS = {
    "llama-3-8b": (preset("llama-3-8b"), Recipe(), Workload()),
    "gemma-3-4b": (preset("gemma-3-4b"), Recipe(Scheme(64, "bfloat16")), Workload()),
    "mixtral-8x7b": (preset("mixtral-8x7b"), Recipe(), Workload(runtime="vllm")),
    "compressed cache": (LATENT, Recipe(keep=("lm_head*",)), Workload(runtime="transformers-tp")),
    "qwen2.5-0.5b": (
        preset("qwen2.5-0.5b"),
        Recipe(Scheme("row")),
        Workload(device="cpu", overhead=Range(1, 2, 3)),
    ),
}
SCRIPT = """
const found = [];
for (const [name, model] of Object.entries(MODELS))
  for (const groupSize of model.stops.groupSize)
    for (const ranks of model.legalRanks[groupSize].filter((n) => n <= 8))
      for (const context of [1, 100, 2049, 32768])
        for (const batch of [1, 3, 64, 4096])
          for (const kvDtype of ["16bit", "int8"])
            for (const weights of ["16bit", "int8"]) {
              const made = footprint(
                model, { context, batch, ranks, groupSize, kvDtype }, weights);
              found.push([name, groupSize, ranks, context, batch, kvDtype, weights,
                made.parts.map((p) => [p.name, p.sharded, p.replicated]),
                made.total.low, made.total.likely, made.total.high, judge(made.total, 2e10)]);
            }
"""


def planned(name):
    config, recipe, work = MODELS[name]
    found = architecture(config, name)
    if name == "compressed cache":
        found = replace(found, fused_mlp=True, fused_attention=True)
    model = Model.from_recipe(found, recipe)
    return plan(model, work, CARD.num_bytes)


def in_groups():
    """Each model's name and plan, with each size of groups that its page offers, in its order."""
    for name in MODELS:
        found = planned(name)
        for size in page_data(found, CARD)["stops"]["groupSize"]:
            own = str(found.model.recipe.scheme.group_size) == size
            model = found.model if own else with_group_size(found.model, int(size))
            yield name, size, replace(found, model=model)


def expected():
    """The same grid by memory/plan.py, in the same order."""
    rows = []
    for name, size, found in in_groups():
        model = found.model
        ranks = legal_ranks(model, 8)
        grid = product(
            ranks, (1, 100, 2049, 32768), (1, 3, 64, 4096), ("16bit", "int8"), ("16bit", "int8")
        )
        for count, context, batch, kv_dtype, weights in grid:
            work = replace(found.workload, context=context, batch=batch, kv_dtype=kv_dtype)
            made = footprint(model, on_ranks(model, work, count), weights)
            parts = [[p.name, p.sharded, p.replicated] for p in made.parts]
            total = made.total
            key = [name, size, count, context, batch, kv_dtype, weights]
            bounds = [total.low, total.likely, total.high]
            rows.append([*key, parts, *bounds, made.judge(20_000_000_000)])
    return rows


@pytest.fixture(scope="module")
def grid_page(tmp_path_factory):
    page = tmp_path_factory.mktemp("page") / "plan.html"
    page.write_text(render(planned("llama-3-8b"), CARD))
    return page


def models_json():
    return json.dumps({name: page_data(planned(name), CARD) for name in MODELS})


def by_the_page(page, program):
    """What `program` has found by the page's own script."""
    script = re.search(r"<script>(.*?)</script>", page.read_text(), re.DOTALL)[1]
    models = f"const MODELS = {models_json()};"
    whole = f"{script}\n{models}{program}console.log(JSON.stringify(found));"
    done = subprocess.run([NODE, "-"], input=whole, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_node
def test_the_arithmetic_is_pythons_in_node(grid_page):
    """The very script of the page, over batch, context, GPUs, groups and cache of five models."""
    assert by_the_page(grid_page, SCRIPT) == expected()


COMMANDS = """
const found = [];
for (const [name, model] of Object.entries(MODELS))
  for (const groupSize of model.stops.groupSize)
    for (const ranks of model.legalRanks[groupSize].filter((n) => n <= 8))
      for (const kvDtype of ["16bit", "int8"])
        found.push(commands(model, { context: 100, batch: 3, ranks, groupSize, kvDtype }));
"""


@needs_node
def test_the_commands_are_pythons(grid_page):
    wanted = []
    for name, _, found in in_groups():
        for count, kv_dtype in product(legal_ranks(found.model, 8), ("16bit", "int8")):
            work = replace(found.workload, context=100, batch=3, kv_dtype=kv_dtype)
            made = replace(found, workload=on_ranks(found.model, work, count))
            wanted.append(commands(name, made, CARD.num_bytes))
    assert by_the_page(grid_page, COMMANDS) == wanted
    assert len({tuple(lines) for lines in wanted}) > 40


def test_a_file_that_is_made_is_run_as_it_is(int8_folder):
    found = plan(planned_model(int8_folder), Workload(64), CARD.num_bytes)
    data = page_data(found, CARD, int8_folder)["commands"]
    assert (data["quantize"], data["folder"], data["source"]) == (None, int8_folder, "")
    assert data["madeInGroupsOf"] == "32"
    page = render(found, CARD, int8_folder)
    assert f'"folder": "{int8_folder}"' in page


@needs_chromium
def test_the_arithmetic_is_pythons_in_chromium(grid_page):
    script = f"const MODELS = {models_json()};{SCRIPT}answer = found;"
    found = json.loads(run_in_page(grid_page, script))
    assert len(found) > 2000
    assert found == expected()


@needs_chromium
def test_the_controls_recompute(grid_page):
    """Sliders and cells by their own events, then what the page shows."""
    script = """
const move = (id, value) => {
  const slider = document.getElementById(id);
  slider.value = value;
  slider.dispatchEvent(new Event("input"));
};
const shown = () => document.getElementById("bars").textContent;
answer = [shown()];
move("batch", MODEL.stops.batch.indexOf(16)); answer.push(shown());
move("ranks", 1);
for (const id of ["bars-title", "commands", "source"])
  answer.push(document.getElementById(id).textContent);
move("ranks", 0);
move("groupSize", 0); answer.push(shown());
move("groupSize", 2);
document.getElementById("kvDtype").value = "int8";
document.getElementById("kvDtype").dispatchEvent(new Event("change")); answer.push(shown());
document.querySelector('[data-cell="64x8192"]').click();
answer.push(shown(), document.getElementById("batch-out").value,
  document.activeElement.getAttribute("aria-label"));
"""
    first, batch, title, ran, source, groups, int8, cell, value, focused = json.loads(
        run_in_page(grid_page, script)
    )
    model = planned("llama-3-8b").model

    def likely(work, of=model):
        total = footprint(of, work, "int8").total.likely
        return f"likely {total / 1e9:.2f} GB ({total / 2**30:.2f} GiB)"

    assert likely(Workload()) in first
    assert likely(Workload(batch=16)) in batch
    assert "2 GPUs (halfweight)" in title
    limits = "--max-context 4096 --max-sequences 16"
    assert ran.splitlines()[0] == "halfweight quantize MODEL OUT"
    assert ran.splitlines()[1] == f"halfweight serve OUT {limits} --tensor-parallel 2"
    assert "MODEL: the folder or Hub id of llama-3-8b" in source
    assert likely(Workload(batch=16), with_group_size(model, 32)) in groups
    assert likely(Workload(batch=16, kv_dtype="int8")) in int8
    assert likely(Workload(8192, 64, "int8")) in cell
    assert "does not fit" in cell
    assert value == "64"
    assert focused.startswith("batch 64, context 8192:")


@needs_chromium
@pytest.mark.parametrize("size", [(1100, 1500), (390, 1700)], ids=["desk", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_looks_right(grid_page, tmp_path, size, dark):
    """A screenshot has bars, all three colours of a verdict's cell, and a readable background."""
    from matplotlib.image import imread

    shot = tmp_path / "shot.png"
    options = [f"--screenshot={shot}", f"--window-size={size[0]},{size[1]}"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    chromium(grid_page, *options)
    pixels = (imread(shot)[:, :, :3] * 255).round().astype(int)
    corner = pixels[2, 2].sum()
    assert corner < 100 if dark else corner > 700
    colours = {tuple(c) for c in pixels.reshape(-1, 3)[::3].tolist()}
    page = grid_page.read_text()
    style = page.split("prefers-color-scheme: dark")[1] if dark else page
    for name in ("--c0", "--c2", "--c3"):
        code = re.search(rf"{name}: #(\w{{6}})", style)[1]
        assert tuple(bytes.fromhex(code)) in colours, f"{name} is not on the page"


@needs_chromium
def test_nothing_is_wider_than_a_phone(grid_page):
    """The tables scroll inside their own boxes; Chromium's window is no narrower than 500."""
    script = """
document.body.style.width = "350px";
answer = [document.body.scrollWidth, document.getElementById("heat").scrollWidth];
"""
    body, table = json.loads(run_in_page(grid_page, script))
    assert body <= 350 < table


def test_it_loads_nothing(grid_page):
    page = grid_page.read_text()
    assert not re.search(r"https?://|src=|@import|url\(|fetch\(|<link", page)


def test_names_cannot_break_out_of_the_script():
    found = planned("llama-3-8b")
    name = "</script><img src=x onerror=alert(1)>"
    model = replace(found.model, architecture=replace(found.model.architecture, name=name))
    page = render(replace(found, model=model), CARD)
    assert name not in page
    assert page.count("</script>") == 2


def test_the_command_writes_both(capsys, tmp_path):
    page, picture = tmp_path / "plan.html", tmp_path / "plan.png"
    options = ("--gpus", "4x24GB", "--html", str(page), "--png", str(picture))
    code, _, err = run(capsys, "plan", "llama-3-70b", *options)
    assert code == 0
    assert "llama-3-70b" in page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"wrote {page}" in err


def test_a_picture_without_matplotlib_names_the_remedy(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    options = ("--gpus", "24GB", "--png", str(tmp_path / "plan.png"))
    code, _, err = run(capsys, "plan", "llama-3-8b", *options)
    assert code == 2
    assert "a picture needs matplotlib" in err
    assert "halfweight[report]" in err
