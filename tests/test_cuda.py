"""What a GPU computes is what float64, transformers and the CPU compute.

    pytest -m cuda

Skipped where torch finds no CUDA device. CAPGAP_TEST_DEVICE=cpu runs the same tests on a CPU.
"""

import dataclasses
import json
import math
import os
import shutil
import warnings
from typing import get_args

import pytest
import torch
from torch.nn import functional

from capgap.distill.cache import CachedTeacher, CacheFormat, CacheIdentity, CacheWriter, write_cache
from capgap.distill.divergences import Divergence, DivergenceName
from capgap.distill.head import HeadInput
from capgap.distill.losses import column_loss
from capgap.distill.teacher import OnlineTeacher
from capgap.errors import Interrupted
from capgap.evaluate.losses import evaluate_heldout, heldout_set
from capgap.evaluate.sample import sample_text
from capgap.models.build import build_model, load_model, save_model
from capgap.models.parts import Parts
from capgap.models.shape import ladder_shape
from capgap.prune.importance import score
from capgap.prune.surgery import cut
from capgap.train.learner import Learner
from capgap.train.loop import LoopSettings, train

DEVICE = os.environ.get("CAPGAP_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="torch finds no CUDA device"
    ),
]
SETTINGS = LoopSettings(batch_windows=8, micro_batch_windows=4, data_seed=5)


def model_of(size, *, seed=0, vocabulary=300):
    shape = ladder_shape("llama", size, vocabulary=vocabulary, positions=16)
    return build_model(shape, seed=seed)


def learner(name="student", *, size=8_000, seed=0, steps=8, alpha=0.5):
    return Learner(name, model_of(size, seed=seed).to(DEVICE), steps, 5e-3, alpha)


def online():
    return OnlineTeacher(model_of(20_000, seed=1, vocabulary=320).to(DEVICE))


def weights(one):
    return torch.cat([value.detach().flatten() for value in one.model.parameters()])


def heads(dtype, *, vocabulary=1003, tokens=150):
    """Student and teacher, a few tenths of a nat apart, with the numbers that `dtype` can hold."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    weight, bias, hidden = draw(vocabulary, 64) / 4, draw(vocabulary), draw(tokens, 64)
    near = (hidden + 0.3 * draw(tokens, 64)).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[::7] = -100
    return (hidden, weight, bias), (near, weight, bias), targets.to(DEVICE)


@pytest.mark.parametrize("name", get_args(DivergenceName))
@pytest.mark.parametrize(("dtype", "far"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, id="compiled")])
def test_losses_and_gradients_are_those_of_float64(
    name, dtype, far, temperature, compiled, record_property
):
    student, teacher, targets = heads(dtype)
    found = []
    # a leaf in fp32, whose gradient is not rounded; the product reads it in `dtype`
    for wide, read in ((torch.float32, dtype), (torch.float64, None)):
        leaves = [one.to(wide, copy=True).requires_grad_() for one in student]
        above = [one if read else one.double() for one in teacher]
        result = column_loss(
            [HeadInput(*leaves, softcap=30.0, dtype=read)],
            targets,
            alphas=[0.7],
            teacher=HeadInput(*above, softcap=30.0),
            temperature=temperature,
            divergence=Divergence(name),
            chunk_tokens=64,
            compiled=compiled and read is not None,
        )
        result.students[0].loss.backward()
        found.append([result.students[0].loss.detach(), *(one.grad for one in leaves)])
    errors = [
        ((ours.double() - exact).norm() / exact.norm()).item()
        for ours, exact in zip(*found, strict=True)
    ]
    record_property("relative error", max(errors))
    assert max(errors) < far


def test_float64_itself_is_that_of_plain_torch():
    student, teacher, targets = heads(torch.float32)
    leaves = [one.double().requires_grad_() for one in student]
    result = column_loss(
        [HeadInput(*leaves)],
        targets,
        alphas=[0.7],
        teacher=HeadInput(*(one.double() for one in teacher)),
    )
    logits, above = (
        functional.linear(*(one.double() for one in side)) for side in (student, teacher)
    )
    ce = functional.cross_entropy(logits, targets, reduction="sum")
    kl = functional.kl_div(
        logits.log_softmax(-1), above.log_softmax(-1), log_target=True, reduction="none"
    )
    expected = 0.3 * ce + 0.7 * kl.sum(-1)[targets != -100].sum()
    torch.testing.assert_close(result.students[0].loss.detach(), expected)


def test_a_loss_in_chunks_is_the_whole_one():
    found = []
    for rows in (17, 10_000):
        student, teacher, targets = heads(torch.bfloat16)
        leaves = [one.float().requires_grad_() for one in student]
        result = column_loss(
            [HeadInput(*leaves, dtype=torch.bfloat16)],
            targets,
            alphas=[0.5],
            teacher=HeadInput(*teacher),
            chunk_tokens=rows,
        )
        result.students[0].loss.backward()
        found.append([result.students[0].loss.detach(), *(one.grad for one in leaves)])
    for parts, whole in zip(*found, strict=True):
        assert (parts - whole).norm() < 5e-3 * whole.norm()


def test_a_teacher_from_a_cache_teaches_as_it_does_online(small_corpus, tmp_path):
    """All but one of the words are kept, to float16."""
    corpus, teacher = small_corpus, online()
    identity = CacheIdentity.of("teacher", "", teacher.dtype, corpus, document_mask=False)
    writer = CacheWriter(tmp_path / "cache", identity, CacheFormat(300, top_k=299, samples=0))
    write_cache(writer, teacher, corpus, device=torch.device(DEVICE), batch_windows=256)
    found = []
    for source in (teacher, CachedTeacher(tmp_path / "cache", corpus)):
        one = learner(steps=4)
        train([one], corpus, SETTINGS, teacher=source)
        found.append(one.curve)
    for name in ("ce", "kl", "teacher_ce", "teacher_entropy"):
        assert found[1][name] == pytest.approx(found[0][name], rel=2e-3)


def test_a_column_is_its_students_alone(small_corpus, record_property):
    def students():
        return [learner("a"), learner("b", size=11_000, seed=3, alpha=0.0)]

    together = students()
    train(together, small_corpus, SETTINGS, teacher=online())
    differences = []
    for alone, one in zip(students(), together, strict=True):
        train([alone], small_corpus, SETTINGS, teacher=online())
        differences.append((weights(alone) - weights(one)).abs().max().item())
    record_property("largest difference", max(differences))
    assert max(differences) < 1e-4


def test_compiled_layers_train_alike(small_corpus, record_property):
    if shutil.which("g++" if DEVICE == "cpu" else "gcc") is None:
        pytest.skip("there is no C compiler")
    found = []
    for compile_ in ("off", "on"):
        one = learner(steps=4)
        settings = dataclasses.replace(SETTINGS, compile=compile_)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own compiler
            train([one], small_corpus, settings, teacher=online())
        found.append(one.curve["kl"])
    record_property("losses", found)
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    small_corpus, tmp_path, dtype, record_property
):
    settings = dataclasses.replace(SETTINGS, autocast_dtype=dtype, checkpoint_seconds=0.0)
    taken = 0

    def count(progress):
        nonlocal taken
        taken = progress.step

    whole, stopped, continued = (learner() for _ in range(3))
    train([whole], small_corpus, settings, teacher=online())
    options = {"teacher": online(), "checkpoint_folder": tmp_path / "checkpoints"}
    with pytest.raises(Interrupted):
        train(
            [stopped],
            small_corpus,
            settings,
            on_step=count,
            should_stop=lambda: taken == 3,
            **options,
        )
    train([continued], small_corpus, settings, **options)
    difference = (weights(whole) - weights(continued)).abs().max().item()
    record_property("largest difference", difference)
    assert continued.curve["step"] == whole.curve["step"]
    # where a device adds up in another order each time, told and small
    assert difference == 0.0 if DEVICE == "cpu" else difference < 1e-3


def test_scores_and_cuts_are_those_of_a_cpu(small_corpus):
    text = [torch.from_numpy(small_corpus.train.windows_at(range(16)))]
    found = [score(model_of(40_000).to(place), text) for place in ("cpu", DEVICE)]
    for name in ("heads", "neurons", "hidden", "layers"):
        mine, its = (getattr(one, name).cpu() for one in found)
        torch.testing.assert_close(its, mine, rtol=1e-3, atol=1e-6)
    smaller = ladder_shape("llama", 11_000, vocabulary=300, positions=16)
    small = [cut(model_of(40_000).to(place), found[0], smaller) for place in ("cpu", DEVICE)]
    ids = text[0][:, :-1]
    logits = [model(ids.to(model.device)).logits.float().cpu() for model in small]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)


def test_the_held_out_loss_is_that_of_transformers(small_corpus):
    model = model_of(20_000).to(DEVICE).eval()
    documents = heldout_set(small_corpus.heldout_documents(), small_corpus.marks, 16, 300)
    found = evaluate_heldout(Parts(model), documents)
    with torch.no_grad():
        logits = model(documents.inputs.to(DEVICE)).logits.double()
    losses = functional.cross_entropy(
        logits.flatten(0, 1), documents.targets.to(DEVICE).flatten(), reduction="sum"
    )
    assert found.loss == pytest.approx(losses.item() / documents.tokens, rel=1e-5)


def test_text_is_that_of_a_cpu(small_corpus):
    texts = [
        sample_text(
            model_of(20_000).to(place),
            small_corpus.tokenizer,
            "Kaba",
            max_new_tokens=8,
            temperature=0.0,
        )
        for place in ("cpu", DEVICE)
    ]
    assert texts[0] == texts[1]
    again = [
        sample_text(model_of(20_000).to(DEVICE), small_corpus.tokenizer, "", max_new_tokens=8)
        for _ in range(2)
    ]
    assert again[0] == again[1]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.skipif(DEVICE != "cuda", reason="only CUDA tells when its host waits")
def test_the_host_waits_for_nothing_within_a_step(small_corpus):
    """CUDA itself raises an error where it does, but for numbers of the step before."""
    train([learner(steps=2)], small_corpus, SETTINGS, teacher=online())
    steps = learner(steps=6)

    def watch(progress):
        if progress.step == 2:
            torch.cuda.set_sync_debug_mode("error")
        elif progress.step == 5:
            torch.cuda.set_sync_debug_mode("default")

    try:
        train([steps], small_corpus, SETTINGS, teacher=online(), on_step=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_distill_from_the_command_line(typed, small_corpus, tmp_path):
    for name, model in (("teacher", model_of(20_000, seed=1)), ("student", model_of(8_000))):
        save_model(model, tmp_path / name, small_corpus.tokenizer)
    done = typed(
        *("distill", tmp_path / "teacher", tmp_path / "student"),
        *("--corpus", small_corpus.directory, "--window", 16, "--tokens", "4k"),
        *("--out", tmp_path / "out", "-s", "training.batch_tokens=256"),
        *("-s", f"run.device={DEVICE}", "--heldout-steps", 8, "--json"),
    )
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["machine"]["device"].startswith(DEVICE)
    losses = [
        side["heldout"]["loss"] if "heldout" in side else side["loss"]
        for side in (found["before"]["student"], found["after"]["student"])
    ]
    assert math.isfinite(losses[1])
    assert losses[1] < losses[0]
    assert load_model(tmp_path / "out/students/student").config.vocab_size == 300
