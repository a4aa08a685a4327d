"""The loop: what a batch is split into, where it is stopped, and who trains beside it changes
nothing."""

import dataclasses
import itertools
import json
import threading
import traceback

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from capgap.corpus.text import Text, batch_indices
from capgap.corpus.tokens import Corpus
from capgap.distill.teacher import OnlineTeacher
from capgap.errors import Interrupted
from capgap.models.build import build_model
from capgap.models.families import FAMILIES
from capgap.models.shape import ladder_shape
from capgap.train import checkpoint, metrics
from capgap.train.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    find_best,
    find_last,
    read_tensors,
    save_checkpoint,
)
from capgap.train.learner import Learner, make_optimizer
from capgap.train.learning_rate import Schedule
from capgap.train.loop import LoopSettings, restore_best, train
from capgap.train.metrics import StageClock

SETTINGS = LoopSettings(batch_windows=8, micro_batch_windows=8, data_seed=5, checkpoint_seconds=1e9)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Bit-for-bit needs the same number of threads in both runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(size, seed=0, architecture="llama", vocabulary=300):
    shape = ladder_shape(architecture, size, vocabulary=vocabulary, positions=16)
    return build_model(shape, seed=seed)


def learner(name="student", *, size=8000, seed=0, steps=12, alpha=0.0, architecture="llama"):
    model = model_of(size, seed, architecture)
    return Learner(name, model, steps, learning_rate=5e-3, alpha=alpha)


def weights(one):
    return {name: value.clone() for name, value in one.model.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gpt2"])
def test_training_lowers_the_loss(small_corpus, architecture):
    one = learner(steps=40, architecture=architecture)
    train([one], small_corpus, SETTINGS)
    assert one.curve["ce"][0] > 5.5  # about ln 300
    assert one.curve["ce"][-1] < one.curve["ce"][0] - 0.5
    assert one.curve["tokens"][-1] == 40 * 8 * 16


def test_distillation_brings_a_student_closer_to_its_teacher(small_corpus):
    teacher = learner(size=20_000, seed=1, steps=60)
    train([teacher], small_corpus, SETTINGS)
    one = learner(steps=60, alpha=1.0)
    train([one], small_corpus, SETTINGS, teacher=OnlineTeacher(teacher.model))
    assert one.curve["kl"][-1] < 0.5 * one.curve["kl"][0]
    assert all(0 <= share <= 1 for share in one.curve["agreement"])


def test_split_into_micro_batches_changes_nothing(small_corpus):
    """In float64 both ways agree to rounding; a mean of means would not."""
    results = []
    teacher = model_of(20_000, seed=1).double()
    for micro in (8, 3, 1):
        one = learner(alpha=0.5)
        one.model.double()
        train(
            [one],
            small_corpus,
            dataclasses.replace(SETTINGS, micro_batch_windows=micro),
            teacher=OnlineTeacher(teacher),
        )
        results.append(weights(one))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-11)


def test_a_column_trains_each_student_as_if_it_were_alone(small_corpus):
    teacher = model_of(20_000, seed=1)
    together = [learner("a", alpha=0.5), learner("b", size=11_000, steps=7, alpha=0.5)]
    train(together, small_corpus, SETTINGS, teacher=OnlineTeacher(teacher))
    for one, size, steps in ((together[0], 8000, 12), (together[1], 11_000, 7)):
        alone = learner(size=size, steps=steps, alpha=0.5)
        train([alone], small_corpus, SETTINGS, teacher=OnlineTeacher(teacher))
        assert_same(weights(one), weights(alone))


@pytest.mark.parametrize("stop_after", [1, 5, 11])
def test_interrupted_and_continued_equals_uninterrupted(small_corpus, tmp_path, stop_after):
    teacher = model_of(20_000, seed=1)

    def column():
        return [learner("a", alpha=0.5), learner("b", size=11_000, steps=9, alpha=0.5)]

    whole = column()
    train(whole, small_corpus, SETTINGS, teacher=OnlineTeacher(teacher))

    path = tmp_path / "column"
    steps = 0

    def count(progress):
        nonlocal steps
        steps = progress.step

    with pytest.raises(Interrupted):
        train(
            column(),
            small_corpus,
            SETTINGS,
            teacher=OnlineTeacher(teacher),
            checkpoint_folder=path,
            on_step=count,
            should_stop=lambda: steps == stop_after,
        )
    continued, taken = column(), []
    train(
        continued,
        small_corpus,
        SETTINGS,
        teacher=OnlineTeacher(teacher),
        checkpoint_folder=path,
        on_step=lambda progress: taken.append(progress.step),
    )
    assert taken == list(range(stop_after + 1, 13))
    for one, other in zip(whole, continued, strict=True):
        assert_same(weights(one), weights(other))
        assert one.curve == other.curve


def test_going_on_from_before_a_damaged_checkpoint_equals_uninterrupted(small_corpus, tmp_path):
    whole = learner("a")
    train([whole], small_corpus, SETTINGS)
    steps = 0

    def count(progress):
        nonlocal steps
        steps = progress.step

    for stop_after in (4, 9):
        with pytest.raises(Interrupted):
            train(
                [learner("a")],
                small_corpus,
                SETTINGS,
                checkpoint_folder=tmp_path,
                on_step=count,
                should_stop=lambda last=stop_after: steps == last,
            )
    truncated(tmp_path / "step-0000000009")
    continued, first = learner("a"), []
    train(
        [continued],
        small_corpus,
        SETTINGS,
        checkpoint_folder=tmp_path,
        on_step=lambda progress: first.append(progress.step),
    )
    assert first[0] == 5
    assert_same(weights(whole), weights(continued))
    assert whole.curve == continued.curve


def test_a_student_with_dropout_is_continued_exactly(small_corpus, tmp_path):
    def with_dropout():
        one = learner("a", architecture="gpt2", steps=6)
        for module in one.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
        return one

    whole, plain = with_dropout(), learner("a", architecture="gpt2", steps=6)
    train([whole], small_corpus, SETTINGS)
    train([plain], small_corpus, SETTINGS)
    assert whole.curve["ce"] != plain.curve["ce"]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    stop = iter([False, False, True])
    with pytest.raises(Interrupted):
        train(
            [with_dropout()],
            small_corpus,
            SETTINGS,
            checkpoint_folder=tmp_path,
            should_stop=lambda: next(stop),
        )
    continued = with_dropout()
    train([continued], small_corpus, SETTINGS, checkpoint_folder=tmp_path)
    assert_same(weights(whole), weights(continued))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_checkpoint_with_the_lowest_heldout_loss_is_kept(small_corpus, tmp_path):
    settings = dataclasses.replace(SETTINGS, heldout_steps=3, checkpoints=1)
    losses = iter([3.0, 1.0, 2.0, 2.5])
    told, after = [], {}

    def note(progress):
        told.append(progress.heldout)
        after[progress.step] = weights(one)

    one = learner("a", steps=11)
    train(
        [one],
        small_corpus,
        settings,
        checkpoint_folder=tmp_path,
        on_step=note,
        heldout_loss=lambda _: next(losses),
    )
    assert {step + 1: one for step, one in enumerate(told) if one} == {
        3: {"a": 3.0},
        6: {"a": 1.0},
        9: {"a": 2.0},
        11: {"a": 2.5},
    }
    assert steps_kept(tmp_path) == [6, 11]
    assert restore_best([one], tmp_path) == 6
    assert_same(weights(one), after[6])


def test_labels_that_are_ignored_do_not_count(small_corpus):
    """The loss is a mean over the others, whatever share of a micro-batch they are."""
    ignored = tuple(range(100, 290))
    settings = dataclasses.replace(SETTINGS, ignored_labels=ignored, micro_batch_windows=3)
    one = learner("a", steps=1)
    indices = batch_indices(seed=5, step=0, batch_windows=8, num_windows=small_corpus.windows)
    windows = torch.from_numpy(small_corpus.train.windows_at(indices))
    logits = one.model(windows[:, :-1]).logits.flatten(0, 1)
    targets = windows[:, 1:].flatten()
    counts = ~torch.isin(targets, torch.tensor(ignored))
    assert 0 < counts.sum() < len(targets)
    expected = torch.nn.functional.cross_entropy(logits[counts], targets[counts])
    train([one], small_corpus, settings)
    assert one.curve["ce"] == pytest.approx([expected.item()], rel=1e-5)
    assert one.curve["tokens"] == [8 * 16]


def test_a_batch_in_which_no_label_counts_changes_nothing_but_by_decay(small_corpus):
    settings = dataclasses.replace(SETTINGS, ignored_labels=tuple(range(300)), weight_decay=0.0)
    one = learner("a", steps=2)
    before = weights(one)
    train([one], small_corpus, settings)
    assert one.failure is None
    assert one.curve["ce"] == [0.0, 0.0]
    assert_same(weights(one), before)


def test_a_student_that_has_ended_is_told_of_once_and_not_trained_again(small_corpus, tmp_path):
    path = tmp_path / "column"
    ended = []
    steps = 0

    def count(progress):
        nonlocal steps
        steps = progress.step

    def column():
        return [learner("short", steps=4), learner("long", size=11_000, steps=9)]

    with pytest.raises(Interrupted):
        train(
            column(),
            small_corpus,
            SETTINGS,
            checkpoint_folder=path,
            on_step=count,
            should_stop=lambda: steps == 6,
            on_end=lambda one: ended.append(one.id),
        )
    assert ended == ["short"]
    train(
        column()[1:],
        small_corpus,
        SETTINGS,
        checkpoint_folder=path,
        on_end=lambda one: ended.append(one.id),
    )
    assert ended == ["short", "long"]


def test_non_finite_loss_stops_that_student_alone(small_corpus):
    broken, sound = learner("broken"), learner("sound", size=11_000)
    with torch.no_grad():
        broken.model.get_input_embeddings().weight[5] = float("nan")
    before = weights(broken)
    ended = []
    train([broken, sound], small_corpus, SETTINGS, on_end=lambda one: ended.append(one.id))
    assert ended == ["broken", "sound"]
    assert broken.failure["step"] == 0
    assert len(broken.failure["windows"]) == 8
    assert "non-finite" in broken.failure["message"]
    after = weights(broken)
    for name, value in before.items():
        assert torch.equal(torch.nan_to_num(value), torch.nan_to_num(after[name]))
    assert sound.failure is None
    assert sound.curve["step"][-1] == 12


def test_numbers_that_are_read_a_step_late_say_the_same(small_corpus, tmp_path, monkeypatch):
    """As on a GPU: what is measured, what fails and what a checkpoint holds do not depend on it."""

    def column():
        broken = learner("broken", size=11_000)
        broken.learning_rate = float("inf")  # its first step spoils it, its second finds out
        return [learner("a", alpha=0.5), learner("short", steps=5, alpha=0.5), broken]

    def run(models, settings=SETTINGS, **more):
        ended = []
        teacher = model_of(20_000, seed=1)
        train(
            models,
            small_corpus,
            settings,
            teacher=OnlineTeacher(teacher),
            on_end=lambda one: ended.append(one.id),
            **more,
        )
        return ended

    whole = column()
    assert run(whole) == ["broken", "short", "a"]
    assert whole[2].failure["step"] == 1

    monkeypatch.setattr(metrics, "LAG", {"cpu": 1})
    steps, losses = 0, []

    def count(progress):
        nonlocal steps
        steps = progress.step
        losses.append([one["loss"] for step in progress.reports for one in step.learners.values()])

    late = column()
    assert run(late, on_step=count) == ["broken", "short", "a"]
    assert losses[0] == []
    folder = tmp_path / "column"
    with pytest.raises(Interrupted):
        run(column(), on_step=count, checkpoint_folder=folder, should_stop=lambda: steps == 3)
    continued = column()
    assert run(continued, checkpoint_folder=folder) == ["broken", "short", "a"]
    often = dataclasses.replace(SETTINGS, checkpoint_seconds=0.0, checkpoint_share=0.99)
    saved_often = column()
    told = run(saved_often, checkpoint_folder=tmp_path / "often", settings=often)
    assert sorted(told) == ["a", "broken", "short"]
    for models in (late, continued, saved_often):
        for one, other in zip(whole, models, strict=True):
            assert one.curve == other.curve
            assert one.failure == other.failure
            mine, its = weights(one), weights(other)
            for name, value in mine.items():
                assert torch.equal(torch.nan_to_num(value), torch.nan_to_num(its[name]))


def test_a_document_mask_holds_for_teacher_and_student_in_every_micro_batch(small_corpus):
    # the commonest token ends a document, so that every window holds several
    tokens = small_corpus.train.windows_at(range(100))
    end = int(np.bincount(tokens.ravel()).argmax())
    source = small_corpus.sources[0]
    manifest = source.manifest | {"marks": {"begin": end, "end": end, "begin_windows": False}}
    corpus = Text.of([Corpus(source.directory, manifest, source.window)])

    def trained(**settings):
        one = learner("a", alpha=0.5, steps=4)
        train(
            [one],
            corpus,
            dataclasses.replace(SETTINGS, **settings),
            teacher=OnlineTeacher(model_of(20_000, seed=1)),
        )
        return one

    plain, masked = trained(), trained(document_mask=True)
    split = trained(document_mask=True, micro_batch_windows=2)
    for column in ("ce", "kl", "teacher_ce"):
        assert split.curve[column] == pytest.approx(masked.curve[column], rel=1e-5)
        # the first step's weights are the same, so what differs is what can be seen
        assert masked.curve[column][0] != pytest.approx(plain.curve[column][0], rel=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gpt2"])
def test_activation_checkpointing_keeps_less_and_changes_nothing(small_corpus, architecture):
    def trained(**settings):
        one = learner("a", size=40_000, steps=2, architecture=architecture)
        kept = []

        def keep(tensor):
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            train([one], small_corpus, dataclasses.replace(SETTINGS, **settings))
        return one, sum(kept)

    plain, kept = trained()
    again, kept_again = trained(activation_checkpointing=True)
    assert_same(weights(plain), weights(again))
    assert kept_again < kept / 2


class Waits(TorchDispatchMode):
    """What makes a host wait for its device: numbers that it reads, sizes that depend on values."""

    OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "bincount")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        if name in self.OPERATORS:
            self.found.append("".join(traceback.format_stack(limit=6)))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("architecture", list(FAMILIES))
@pytest.mark.parametrize("document_mask", [False, True])
def test_the_host_waits_for_nothing_within_a_step(small_corpus, architecture, document_mask):
    settings = dataclasses.replace(SETTINGS, document_mask=document_mask, micro_batch_windows=4)
    one = learner("a", steps=3, alpha=0.5, architecture=architecture)
    other = learner("b", steps=3, alpha=0.0, architecture=architecture)
    # what it is tried with when it is opened is no part of a step
    teacher = OnlineTeacher(model_of(20_000, seed=1, architecture=architecture))
    waits = Waits()
    with waits:
        train([one, other], small_corpus, settings, teacher=teacher)
    assert waits.found == []


def test_teacher_is_left_as_it_was(small_corpus):
    teacher = model_of(20_000, seed=1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    train([learner(alpha=0.5)], small_corpus, SETTINGS, teacher=OnlineTeacher(teacher))
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])


def test_schedule_warms_up_and_falls_to_zero():
    shares = [Schedule(warmup_fraction=0.1).share(step, 100) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9] == shares[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(shares[10:]))
    assert 0 < shares[99] < 0.001
    assert Schedule().share(0, 1) == 1.0


def test_a_schedule_may_stay_at_its_peak_and_end_above_zero():
    stable = Schedule("wsd", warmup_fraction=0.1, decay_fraction=0.2)
    shares = [stable.share(step, 100) for step in range(100)]
    assert shares[9:81] == [1.0] * 72
    assert shares[90] == pytest.approx(0.5)
    assert shares[99] == pytest.approx(0.05)
    for kind in ("cosine", "wsd"):
        high = Schedule(kind, final_rate=0.1)
        assert 0.1 < high.share(99, 100) < 0.2
        assert high.share(20, 100) > high.share(99, 100)


@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_weight_decay_spares_norms_biases_and_by_choice_embeddings(decay_embeddings):
    model = model_of(8000, architecture="gpt2")
    optimizer = make_optimizer(model, weight_decay=0.1, decay_embeddings=decay_embeddings)
    decayed, kept = optimizer.param_groups
    names = {id(value): name for name, value in model.named_parameters()}
    decayed_names = {names[id(value)] for value in decayed["params"]}
    assert kept["weight_decay"] == 0
    assert ("transformer.wte.weight" in decayed_names) == decay_embeddings
    assert not any(name.endswith("bias") or ".ln_" in name for name in decayed_names)
    assert "transformer.h.0.attn.c_attn.weight" in decayed_names
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def saved(folder, step, heldout=None):
    tensors = {"a/weight/x": torch.arange(6.0).reshape(2, 3) + step, "a/weight/y": torch.ones(3)}
    losses = {} if heldout is None else {"a": heldout}
    save_checkpoint(folder, Checkpoint(step, {"a": {"curve": [1.5, None]}}, losses), tensors)
    return folder / f"step-{step:010d}"


def test_checkpoint_round_trip_and_absence(tmp_path):
    folder = tmp_path / "deep" / "run"
    assert find_last(folder) is None
    saved(folder, 7)
    found = find_last(folder)
    assert found.step == 7
    assert found.state == {"a": {"curve": [1.5, None]}}
    tensor = torch.zeros(2, 3)
    read_tensors(found, {"a/weight/x": tensor})
    assert torch.equal(tensor, torch.arange(6.0).reshape(2, 3) + 7)


CPU = torch.device("cpu")


def writer_of(folder, **changes):
    asked = {"keep": 2, "seconds": 0.0, "share": 0.99, "device": CPU}
    return CheckpointWriter(folder, **(asked | changes))


def test_a_checkpoint_is_of_its_step_whatever_comes_while_it_is_written(tmp_path, monkeypatch):
    may_write, write = threading.Event(), checkpoint.save_checkpoint

    def slowly(*arguments, **options):
        assert may_write.wait(timeout=60)
        write(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save_checkpoint", slowly)
    weight, curve = torch.ones(3), [1.5]
    with writer_of(tmp_path) as writer:
        assert writer.is_due()
        writer.save(Checkpoint(1, {"curve": curve}, {}), {"a": weight})
        # training goes on
        weight.add_(1)
        curve.append(2.5)
        assert not writer.is_due()
        may_write.set()
        writer.save(Checkpoint(2, {"curve": curve}, {}), {"a": weight})
    assert steps_kept(tmp_path) == [1, 2]
    for step, expected in ((1, [1.5]), (2, [1.5, 2.5])):
        found = checkpoint._first_whole([tmp_path / f"step-{step:010d}"], checkpoint.ALONE)
        read = {"a": torch.zeros(3)}
        read_tensors(found, read)
        assert found.state["curve"] == expected
        assert torch.equal(read["a"], torch.full((3,), float(step)))


def test_checkpoints_take_their_share_of_the_time(tmp_path, monkeypatch):
    """A copy of 2 s, and writing that computes for 1 s of its 4 s; 2% is once in 150 s."""
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(checkpoint.time, "thread_time", lambda: now[0] / 4)

    def passing(seconds):
        def work(*_, **__):
            now[0] += seconds

        return work

    monkeypatch.setattr(checkpoint, "save_checkpoint", passing(4.0))
    with writer_of(tmp_path, seconds=30.0, share=0.02) as writer:
        now[0] = 29.0
        assert not writer.is_due()
        now[0] = 31.0
        assert writer.is_due()
        monkeypatch.setattr(writer._stager, "stage", passing(2.0))
        writer.save(Checkpoint(1, {}, {}), {})
        writer.finish()
        ended = now[0]
        now[0] = ended + 3 * 49 - 1
        assert not writer.is_due()
        now[0] = ended + 3 * 49 + 1
        assert writer.is_due()


def test_a_checkpoint_lies_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 100)
    tensors = {f"a/weight/{number}": torch.full((20,), float(number)) for number in range(7)}
    save_checkpoint(tmp_path, Checkpoint(1, {}, {}), tensors)
    found = find_last(tmp_path)
    assert len(list(found.place.glob("*.safetensors"))) == 4
    read = {name: torch.zeros(20) for name in tensors}
    read_tensors(found, read)
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor)


def test_what_went_wrong_in_writing_is_raised(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space"), writer_of(tmp_path) as writer:
        writer.save(Checkpoint(1, {}, {}), {})
    # an error of the training itself comes first
    writer = writer_of(tmp_path)
    writer.save(Checkpoint(1, {}, {}), {})
    assert writer.__exit__(ValueError) is None


class Mark:
    """A point in the queue of a GPU that has come to `now`."""

    now = 0.0
    given = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        self.at = Mark.given

    def query(self):
        return self.at <= Mark.now

    def synchronize(self):
        Mark.now = max(Mark.now, self.at)

    def elapsed_time(self, other):
        return 1000 * (other.at - self.at)


def test_a_clock_of_a_gpu_tells_work_and_not_when_it_was_given(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Mark)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    clock = StageClock("cuda")
    for name, work in (("forward", 2.0), ("backward", 4.0), ("forward", 2.0)):
        with clock.stage(name):
            Mark.given += work
    # the host did not wait
    assert Mark.now == 0.0
    assert clock.seconds == {"forward": 4.0, "backward": 4.0}
    assert Mark.now == Mark.given


def steps_kept(folder):
    return sorted(int(entry.name.removeprefix("step-")) for entry in folder.iterdir())


def test_the_last_two_checkpoints_and_the_best_stay(tmp_path):
    assert find_best(tmp_path) is None
    for step in (7, 90, 1000):
        saved(tmp_path, step)
    assert steps_kept(tmp_path) == [90, 1000]
    assert find_best(tmp_path) is None
    for step, heldout in ((1001, 3.0), (1002, 2.5), (1003, 2.5), (1004, 2.75), (1005, None)):
        saved(tmp_path, step, heldout)
    assert steps_kept(tmp_path) == [1003, 1004, 1005]
    assert find_best(tmp_path).step == 1003
    assert find_best(tmp_path).heldout == {"a": 2.5}
    truncated(tmp_path / "step-0000001003")
    assert find_best(tmp_path).step == 1004


def test_the_best_is_so_for_the_students_that_are_left(tmp_path):
    tensors = {"a/weight/x": torch.ones(2)}
    for step, losses in ((1, {"a": 2.0, "b": 9.0}), (2, {"a": 3.0, "b": 4.0}), (3, {"a": 2.5})):
        save_checkpoint(tmp_path, Checkpoint(step, {}, losses), tensors, keep=3)
    assert find_best(tmp_path).step == 1


def test_a_damaged_checkpoint_does_not_take_the_place_of_later_work(tmp_path):
    for step in (7, 90):
        saved(tmp_path, step)
    truncated(tmp_path / "step-0000000090")
    # going on from 7, with one checkpoint kept
    save_checkpoint(tmp_path, Checkpoint(8, {}, {}), {"a/weight/x": torch.ones(2)}, keep=1)
    assert find_last(tmp_path).step == 8
    assert steps_kept(tmp_path) == [8]


def tensors_of(place):
    (path,) = place.glob("*.safetensors")
    return path


def truncated(place):
    path = tensors_of(place)
    path.write_bytes(path.read_bytes()[:-5])


def one_bit_changed(place):
    path = tensors_of(place)
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def without_its_mark(place):
    (place / "manifest.json").unlink()


def without_tensors(place):
    tensors_of(place).unlink()


def of_an_older_version(place):
    manifest = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps(manifest | {"schema": 1}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncated, "bytes"),
        (one_bit_changed, "sha256"),
        (without_its_mark, "manifest.json"),
        (without_tensors, "missing"),
        (of_an_older_version, "schema 1"),
    ],
)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(tmp_path, caplog, spoil, words):
    saved(tmp_path, 7)
    spoil(saved(tmp_path, 90))
    assert find_last(tmp_path).step == 7
    records = [record for record in caplog.records if record.name.startswith("capgap")]
    (message,) = [record.getMessage() for record in records]
    assert "step-0000000090 is damaged" in message
    assert words in message
    # the same step again takes the place of the damaged one
    saved(tmp_path, 90)
    assert find_last(tmp_path).step == 90


def test_what_a_killed_writer_left_is_no_checkpoint(tmp_path):
    saved(tmp_path, 7)
    (tmp_path / ".step-0000000090").mkdir()
    (tmp_path / ".step-0000000090" / "shard-00001.safetensors").write_bytes(b"half")
    assert find_last(tmp_path).step == 7
    saved(tmp_path, 91)
    assert find_last(tmp_path).step == 91
    assert not (tmp_path / ".step-0000000090").exists()
