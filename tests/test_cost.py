"""What a recipe would take: activations as autograd saves them, the peak as torch allocates it, the
published run, sweeps, and mistakes."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from capgap.config import find_recipe, load_any_recipe, load_recipe, shipped_recipes
from capgap.corpus.text import Text
from capgap.cost.plan import estimate, find_teacher, plan_sweep
from capgap.distill.cache import CacheFormat
from capgap.distill.teacher import OnlineTeacher
from capgap.errors import UserError
from capgap.models.build import build_model, checkpoint_activations, to_config
from capgap.models.families import FAMILIES
from capgap.models.parts import Parts
from capgap.models.shape import Shape, ladder_shape
from capgap.stages.prune import Prune, PruneSection
from capgap.sweep.memory import task_loops
from capgap.sweep.plan import expected_baselines, make_plan
from capgap.sweep.recipe import Recipe
from capgap.train.learner import Learner
from capgap.train.loop import LoopSettings, train
from capgap.train.memory import PARTS, LoopMemory, cast_bytes, kept_bytes, layer_bytes

ROWS, WINDOW = 2, 32
# architecture, autocast, document mask, query heads on a key-value head
KEPT_CASES = [
    (name, autocast, mask, group)
    for name, autocast, mask, group in itertools.product(
        FAMILIES, (False, True), (False, True), (1, 2)
    )
    if group == 1 or FAMILIES[name].grouped_heads
]


def small_shape(architecture: str, layers: int, group: int) -> Shape:
    """All widths differ, where the architecture lets them."""
    hidden = 80 if FAMILIES[architecture].free_width else 96
    return Shape(architecture, hidden, layers, 4, 4 // group, 24, 200, 300, 64, True)


def saved_bytes(shape: Shape, *, autocast: bool, mask: bool, checkpointed: bool = False) -> int:
    """What autograd saves in a forward pass, every tensor once, weights left out."""
    model = build_model(shape, seed=0)
    if checkpointed:
        checkpoint_activations(model)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    tokens = torch.zeros(ROWS, WINDOW, dtype=torch.int64)
    positions = torch.tensor([[*range(20), *range(12)]] * ROWS) if mask else None
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False),
    ):
        hidden = Parts(model).train()(tokens, positions)
    del hidden
    return sum(
        one.untyped_storage().nbytes() for place, one in kept.items() if place not in weights
    )


@pytest.mark.parametrize(("architecture", "autocast", "mask", "group"), KEPT_CASES)
def test_activations_are_those_that_autograd_saves(architecture, autocast, mask, group):
    shapes = [small_shape(architecture, layers, group) for layers in (2, 3)]
    two, three = (saved_bytes(shape, autocast=autocast, mask=mask) for shape in shapes)
    settings = {"autocast": autocast, "document_mask": mask}
    assert three - two == layer_bytes(shapes[0], ROWS * WINDOW, WINDOW, **settings)
    # Gemma keeps one number more: what embeddings are multiplied by
    whole = kept_bytes(shapes[1], ROWS * WINDOW, WINDOW, **settings)
    assert three - whole == (4 if FAMILIES[architecture].scaled_embedding else 0)


@pytest.mark.parametrize("architecture", list(FAMILIES))
@pytest.mark.parametrize("autocast", [False, True])
def test_of_a_checkpointed_layer_its_input_stays(architecture, autocast):
    shapes = [small_shape(architecture, layers, 1) for layers in (2, 3)]
    two, three = (
        saved_bytes(shape, autocast=autocast, mask=False, checkpointed=True) for shape in shapes
    )
    settings = {"autocast": autocast, "checkpointed": True}
    predicted = [kept_bytes(shape, ROWS * WINDOW, WINDOW, **settings) for shape in shapes]
    assert three - two == predicted[1] - predicted[0] == 4 * ROWS * WINDOW * shapes[0].hidden


def test_autocast_copies_matrices_alone():
    for architecture in FAMILIES:
        shape = small_shape(architecture, 2, 1)
        model = build_model(shape, seed=0)
        layer = Parts(model).layers[0]
        matrices = sum(weight.numel() for weight in layer.parameters() if weight.ndim == 2)
        assert cast_bytes(shape) == 2 * matrices


def allocated_peak(work: Callable[[], None]) -> int:
    """The most that torch has allocated at once, of what it allocated in `work`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    events = [one for one in results.events() if one.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize(
    ("architecture", "micro_batches", "checkpointing", "teacher"),
    [
        ("llama", 1, False, False),
        ("llama", 2, False, True),
        ("gpt2", 1, False, True),
        ("gpt_neox", 2, True, True),
    ],
)
def test_the_peak_is_what_torch_allocates(
    tmp_path, small_corpus, architecture, micro_batches, checkpointing, teacher
):
    words, window, micro = small_corpus.vocabulary, 64, 2048
    corpus = Text.open([(small_corpus.directory, None)], window)
    shape, above = (
        ladder_shape(architecture, size, vocabulary=words, positions=window)
        for size in (400_000, 1_000_000)
    )

    def work() -> None:
        source = OnlineTeacher(build_model(above, seed=0)) if teacher else None
        learner = Learner("one", build_model(shape, seed=1), 2, 1e-3, 0.5 if teacher else 0.0)
        settings = LoopSettings(
            micro * micro_batches // window,
            micro // window,
            0,
            activation_checkpointing=checkpointing,
        )
        train([learner], corpus, settings, teacher=source)

    loop = LoopMemory(
        students=(shape,),
        teacher=above if teacher else None,
        window=window,
        micro_batch_tokens=micro,
        micro_batches=micro_batches,
        activation_checkpointing=checkpointing,
    )
    predicted = sum(loop.peak()[1].values())
    assert predicted == pytest.approx(allocated_peak(work), rel=0.12)


def loop(**changes) -> LoopMemory:
    shape = Shape("llama", 64, 2, 4, 4, 16, 160, 500, 64, tied=False)
    above = Shape("llama", 96, 3, 6, 6, 16, 256, 500, 64, tied=False)
    asked = {"students": (shape,), "teacher": above, "window": 64, "micro_batch_tokens": 256}
    return LoopMemory(**(asked | changes))


def test_a_checkpoint_is_copied_into_the_hosts_memory():
    total = loop().students[0].parameters().total
    alone, saving = (loop(checkpoints=checkpoints).peak()[1] for checkpoints in (False, True))
    assert alone | {"checkpoint": 36 * total} == saving
    on_gpu = loop(checkpoints=True, device="cuda")
    assert (on_gpu.peak()[1]["checkpoint"], on_gpu.in_host()) == (0, 36 * total)
    offloaded = loop(device="cuda", teacher_place="host").in_host()
    counts = loop().teacher.parameters()
    assert offloaded == pytest.approx(4 * (counts.attention + counts.ffn + counts.norms), rel=0.01)


def test_ranks_share_weights_and_not_activations():
    alone, shared = (loop(ranks=ranks, micro_batches=2).phases()["loss"] for ranks in (1, 4))
    total = loop().students[0].parameters().total
    assert alone["weights"] == alone["gradients"] == 4 * total
    assert alone["optimizer"] == 8 * total
    for part in ("weights", "gradients", "optimizer"):
        assert shared[part] == alone[part] // 4
    for part in ("activations", "loss_chunks"):
        assert shared[part] == alone[part] > 0
    # what a rank has of the teacher, and the hidden states of its own tokens
    states = 4 * 256 * 96
    assert shared["teacher"] - states == (alone["teacher"] - states) // 4
    assert (alone["gathered"], shared["gathered"] > 0) == (0, True)


def test_what_saves_memory_is_predicted_to():
    def total(**changes) -> int:
        return sum(loop(**changes).peak()[1].values())

    base = total(micro_batch_tokens=2048)
    assert total(micro_batch_tokens=256, micro_batches=8) < base
    assert total(micro_batch_tokens=2048, activation_checkpointing=True) < base
    assert total(micro_batch_tokens=2048, teacher_place="host") < base
    assert total(micro_batch_tokens=2048, teacher_place="elsewhere") < base
    assert total(micro_batch_tokens=2048, teacher=None) < base
    assert total(micro_batch_tokens=2048, teacher_bytes=2) < base
    at_most = loop().at_most()
    assert all(at_most[part] >= loop().peak()[1][part] for part in PARTS)


def test_the_published_run(typed):
    """arXiv 2311.07052: 6.88B to 3.02B, 126B tokens in batches of 1024 x 4096."""
    answer = typed("plan", "minima-3b", "--json")
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    assert found["student_params"] == 3_020_442_624
    # four matrices of attention, three of the FFN, two norms; two tables and the last norm
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert found["teacher_params"] == 32 * layer + 2 * 49_216 * 4096 + 4096
    assert f"{found['teacher_params'] / 1e9:.2f}" == "6.88"
    assert f"{found['steps'] / 1e3:.1f}" == "30.0"
    assert f"{found['flops_total']:.2e}" == "4.02e+21"
    assert found["batch_tokens"] == 1024 * 4096
    assert [place["gpus"] for place in found["places"]] == [1, 16]
    assert found["hours"] == pytest.approx(found["flops_total"] / (16 * 312e12 * 0.3 * 0.98) / 3600)
    assert found["memory_gb"] == pytest.approx(
        sum(found["places"][1]["memory"].values()) / 1e9, abs=1e-3
    )
    assert found["disk"]["checkpoint"] == 12 * 3_020_442_624
    assert found["places"][0]["host_gb"] == pytest.approx(
        12 * 3.020442624 + 2 * 2**30 / 1e9, abs=1e-3
    )
    tokens = found["disk"]["cache"] / CacheFormat(49_216).token_bytes
    assert tokens == pytest.approx(126e9, rel=1e-3)


def test_gpus_on_the_command_line_come_first():
    recipe = load_any_recipe(find_recipe("minima-3b"))
    found = estimate(recipe, gpus="4xH100", utilisation=0.5)
    assert (found["gpus"], found["utilisation"]) == ("4xH100", 0.5)
    assert found["hours"] == pytest.approx(found["flops_total"] / (4 * 989e12 * 0.5 * 0.98) / 3600)
    without = load_any_recipe(find_recipe("minima-3b"), ["training.alpha=0"])
    assert estimate(without)["flops"]["teacher_forward"] == 0


def test_advice_where_it_does_not_fit():
    recipe = load_any_recipe(
        find_recipe("minima-3b"),
        ["training.activation_checkpointing=false", "hardware.gpus=A100"],
    )
    found = estimate(recipe)
    assert found["places"][0]["fits"] is False
    advice = {one["change"]: one for one in found["advice"]}
    assert advice["training.activation_checkpointing=true"]["fits"]
    assert advice["--gpus 2xA100"]["memory_gb"] < found["memory_gb"]
    # what is told of a change is what the recipe with it is told
    changed = load_any_recipe(find_recipe("minima-3b"), ["hardware.gpus=A100"])
    told = advice["training.activation_checkpointing=true"]["memory_gb"]
    assert estimate(changed)["memory_gb"] == told
    assert estimate(changed)["advice"] == []


@pytest.mark.parametrize("ask", [{"keep": 0.4}, {"params": 60_000}, {"params": "90k total"}])
def test_a_run_cuts_the_shape_that_prune_cuts(tmp_path, ask):
    shape = Shape("llama", 64, 4, 4, 4, 16, 160, 500, 64, tied=False)
    to_config(shape).save_pretrained(tmp_path / "teacher")
    overrides = [f"prune.{name}={value}" for name, value in ask.items()]
    path = tmp_path / "run.toml"
    path.write_text(
        f'name="r"\n[teacher]\nmodel="{tmp_path / "teacher"}"\n[prune]\n[distill]\ntokens="1M"\n'
        "window=64\n"
    )
    recipe = load_any_recipe(path, overrides)
    teacher = find_teacher(recipe)
    assert (teacher.shape, teacher.stored_bytes) == (shape, 4)
    ask |= {"teacher": str(tmp_path / "teacher"), "out": tmp_path / "out", "dry_run": True}
    cut = Prune(**ask).run()
    assert vars(recipe.prune.candidates(teacher.shape).shape) == cut["shape"]


SWEEPS = [
    name for name, path in shipped_recipes().items() if isinstance(load_any_recipe(path), Recipe)
]


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_is_told_without_measuring(typed, name):
    answer = typed("plan", name, "--gpus", "2xH100", "--json")
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    recipe = load_recipe(find_recipe(name))
    plan = make_plan(recipe)
    baselines = expected_baselines(plan)
    assert found["flops"] == plan.flops(baselines)
    assert found["cells"] == len(plan.cells)
    assert found["steps"] * recipe.training.batch_tokens == found["tokens"]
    assert found["hours"] >= found["flops_total"] / (2 * 989e12 * 0.4) / 3600
    assert found["fits"] is True


def test_the_largest_task_of_a_sweep_is_of_its_largest_teacher():
    """Its own training, with a copy of its checkpoint, or its column where students are more."""
    few = plan_sweep(load_recipe(find_recipe("quickstart"), ['students.sizes=["24k"]']))
    assert few["memory_task"] == "llama-t240k-seed0"
    assert (few["hours"], few["fits"], few["gpus"]) == (None, None, None)
    more = plan_sweep(load_recipe(find_recipe("quickstart")))
    assert more["memory_task"] == "column-llama-t240k-seed0"
    assert more["memory_gb"] > few["memory_gb"]


@pytest.mark.parametrize("method", ["activation", "weights"])
def test_several_gpus_score_a_model_whole_on_the_first(typed, method):
    recipe = load_recipe(find_recipe("quickstart"), [f"scoring_method={method}"])
    run = recipe.run.model_copy(update={"gpus_per_column": 8})
    teacher = make_plan(recipe).teachers[-1]
    (alone,) = task_loops(recipe, teacher, "H100")
    (shared,) = task_loops(recipe.model_copy(update={"run": run}), teacher, "H100")
    whole = 4 * teacher.shape.parameters().total
    had, has = alone.phases()["scoring"], shared.phases()["scoring"]
    assert (had["weights"], has["weights"]) == (whole, whole + whole // 8)
    assert has["gradients"] == (whole if method == "weights" else 0)
    assert (has["activations"] > 0) == (method == "weights")
    # a model that exists is read, as it is stored, and scored
    (given,) = task_loops(recipe, replace(teacher, source="folder", stored_bytes=2), "H100")
    assert set(given.phases()) == {"scoring"}
    assert given.peak()[1]["weights"] == whole // 2


def test_a_plan_says_where_scoring_needs_most(typed):
    changed = ["run.gpus_per_column=8", 'teachers.sizes=["1B"]', 'students.sizes=["300M"]']
    changed += ["scoring_method=weights", "layers=24"]
    words = [word for one in changed for word in ("--set", one)]
    found = json.loads(typed("plan", "quickstart", *words, "--gpus", "8xH100", "--json").out)
    assert found["peak_phase"] == "scoring"
    told = typed("plan", "quickstart", *words, "--gpus", "8xH100").out
    assert "while it is scored, whole on its first GPU, fits" in told


def test_of_a_family_those_are_planned_that_can_be_cut():
    """Of Gemma 3 those that only read; the others are among the mistakes below."""
    recipe = load_any_recipe(find_recipe("minima-3b"), ["teacher.model=Gemma-3-1B"])
    found = estimate(recipe.model_copy(update={"prune": PruneSection(params="300M")}))
    assert found["teacher_shape"]["architecture"] == "gemma3_text"


def test_for_a_person(typed):
    told = typed("plan", "minima-3b").out
    for words in ("3,020,442,624", "6,879,449,088", "30,040 steps", "4.02e+21", "each of 16"):
        assert words in told
    told = typed("plan", "minima-3b", "--gpus", "L40S").out
    for words in ("does not fit", "to make it fit", "--gpus 2xL40S", "teacher_offload"):
        assert words in told
    told = typed("plan", "chain").out
    assert "in the largest task" in told
    assert "--dry-run" in told


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--set", "teacher.model=Lama-2-7B"], ["'Lama-2-7B'", "did you mean 'Llama-2-7B'"]),
        (["--set", "teacher.model=nowhere"], ["'nowhere'", "no published model and no folder"]),
        (["--set", "teacher.model=Gemma-3-4B"], ["Gemma-3-4B", "can cut"]),
        (["--set", "prune.layers=40"], ["layers 40", "only 32"]),
        (["--set", "prune={params='9B'}"], ["9B", "larger teacher or a smaller student"]),
        (["--set", "prune.keep=0.4"], ["prune", "give one of keep"]),
        (["--set", "prune={}"], ["prune", "give one of keep"]),
        (["--set", "distill.window=8192"], ["distill.window 8192", "4096 tokens"]),
        (["--set", "distill.token=5"], ["'distill.token'", "'tokens'"]),
        (["--set", "training.batch_tokens=5000"], ["5000", "distill.window 4096"]),
        (["--set", "distill.tokens='1M'"], ["distill.tokens 1000000", "batch"]),
        (["--set", "hardware.gpus=8xP100"], ["'8xP100'", "V100, RTX3090"]),
        (["--set", "hardware.utilisation=1.5"], ["hardware.utilisation", "1.5"]),
        (["--gpus", "8xP100"], ["--gpus '8xP100'", "V100, RTX3090"]),
        (["--gpus", "3xA100"], ["1024 windows", "3 GPUs", "training.batch_tokens"]),
        (["--utilisation", "0"], ["--utilisation 0", "above 0"]),
        (["--utilisation", "1.2"], ["--utilisation 1.2", "at most 1"]),
        (["--set", "run.teacher_device=cpu"], ["run.teacher_device 'cpu'", "same"]),
    ],
)
def test_mistakes_in_the_recipe_of_a_run(typed, asked, words):
    answer = typed("plan", "minima-3b", *asked)
    assert (answer.code, answer.err.count("\n"), answer.out) == (2, 1, "")
    for word in words:
        assert word in answer.err


def test_each_kind_of_recipe_is_told_from_the_other(typed, tmp_path):
    answer = typed("sweep", "minima-3b", "--dry-run")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "is the recipe of a run, not of a sweep" in answer.err
    neither = tmp_path / "neither.toml"
    neither.write_text('name = "neither"\n[training]\nalpha = 1\n')
    answer = typed("plan", neither)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "a sweep has [teachers] and [students], a run [teacher]" in answer.err
    with pytest.raises(UserError, match="no recipe"):
        load_any_recipe(tmp_path / "none.toml")


def test_small_models_wait_for_launches(typed):
    """A step of a model of a few layers takes a GPU milliseconds, however few its FLOPs."""
    found = json.loads(typed("plan", "laptop", "--gpus", "H100", "--json").out)
    assert found["bound"] == "launches"
    # two layers and what is beside them, each a millisecond and a half
    assert found["hours"] * 3600 > found["steps"] * 6 * 1.5e-3
    eight = json.loads(typed("plan", "laptop", "--gpus", "8xH100", "--json").out)
    assert found["hours"] / 8 <= eight["hours"] < found["hours"]
    large = json.loads(typed("plan", "minima-3b", "--json").out)
    assert [one["bound"] for one in large["places"]] == ["arithmetic", "arithmetic"]
    assert "wait for the launches" in typed("plan", "laptop", "--gpus", "H100").out
