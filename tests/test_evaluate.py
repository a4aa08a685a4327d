"""`capgap evaluate`: the harness against scoring by hand, sets that are missing, bad input."""

import csv
import io
import json
import math
import shutil
import signal
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch

from capgap.corpus.tokenizer import load_tokenizer, train_tokenizer
from capgap.errors import UserError
from capgap.evaluate import losses
from capgap.evaluate.code_runner import run_program, sandbox_problem
from capgap.evaluate.harness import CountingModel, load_tasks, part_names, run_set
from capgap.evaluate.scores import Part, combine, comparable, known_flops, six_mean
from capgap.evaluate.sets import NAMES, SETS, SIX
from capgap.evaluate.sources import READERS, read_copy, read_local
from capgap.machine import install_command
from capgap.models.build import build_model, load_model, save_model
from capgap.models.shape import ladder_shape
from capgap.stages.evaluate import Evaluate, EvaluateSection
from evaluation_sets import files_of, write_archive, write_folder

POSITIONS = 512


def make_model(folder: Path, tokenizer, *, positions: int = POSITIONS, seed: int = 3) -> Path:
    words = max(tokenizer.get_vocab().values()) + 1
    shape = ladder_shape("llama", 12_000, vocabulary=words, positions=positions)
    model = build_model(shape, seed=seed)
    with torch.no_grad():
        # a model that knows nothing says much the same of all answers
        for weight in model.parameters():
            weight.mul_(1.5)
    save_model(model, folder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def student(small_corpus, tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("student") / "student", small_corpus.tokenizer)


@pytest.fixture(scope="session")
def sets(tmp_path_factory) -> Path:
    """All of them as archives, but PIQA as a folder."""
    folder = tmp_path_factory.mktemp("sets")
    for name in READERS:
        if name == "piqa":
            write_folder(folder / name, files_of(name))
        else:
            write_archive(folder / f"{name}.tar.xz", files_of(name))
    return folder


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    def refuse(name, *, kind):
        raise UserError(f"cannot reach the Hugging Face hub for the {kind} {name!r} (no network)")

    monkeypatch.setattr("capgap.corpus.names.hub_revision", refuse)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "nothing")


def asked(student, tasks, **options):
    """An evaluation on the CPU, without a record where none is named."""
    return Evaluate(
        **{"model": str(student), "tasks": tasks, "device": "cpu", "out": None} | options
    )


def evaluated(student, sets, tmp_path, *tasks, **options):
    """The record, and the samples by set."""
    lines = tmp_path / "samples.jsonl"
    request = asked(student, tasks, data=sets, batch_size=3, samples=lines, **options)
    record = request.run()
    samples = [json.loads(line) for line in lines.read_text().splitlines()]
    return record, samples


# --- the same by hand ---------------------------------------------------------------------------


class ByHand:
    """Plain scoring: one prompt at a time, no batches, no cache."""

    def __init__(self, folder: Path) -> None:
        self.model = load_model(folder).eval()
        self.tokenizer = load_tokenizer(folder)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def score(self, prompt: str, answer: str) -> tuple[float, bool]:
        """Log-likelihood of the answer, and whether every token of it is the likeliest."""
        before = self.encode(prompt) if prompt else [self.tokenizer.eos_token_id]
        whole = self.encode(prompt + answer) if prompt else [*before, *self.encode(answer)]
        with torch.no_grad():
            logits = self.model(torch.tensor([whole])).logits[0].double()
        logs = torch.log_softmax(logits, -1)
        places = range(len(before), len(whole))
        total = sum(logs[place - 1, whole[place]].item() for place in places)
        return total, all(logs[p - 1].argmax().item() == whole[p] for p in places)


def likeliest(scores: list[tuple[float, bool]]) -> int:
    return max(range(len(scores)), key=lambda place: scores[place][0])


def assert_same(sample, scores):
    theirs = [value for value, _ in sample["responses"]]
    assert theirs == pytest.approx([value for value, _ in scores], rel=1e-5, abs=1e-4)
    assert [greedy for _, greedy in sample["responses"]] == [greedy for _, greedy in scores]


def mean_error(values):
    mean = sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(spread / len(values))


def test_blimp_is_that_of_plain_scoring(student, sets, tmp_path):
    record, samples = evaluated(student, sets, tmp_path, "blimp")
    hand, hits = ByHand(student), []
    _, records = read_local(sets, "blimp", part_names(SETS["blimp"]))
    rows = {name: part["train"] for name, part in records.items()}
    for sample in samples:
        pair = rows[sample["task"].removeprefix("blimp_")][sample["question"]]
        # the harness puts a space before every answer
        scores = [hand.score("", f" {pair[k]}") for k in ("sentence_good", "sentence_bad")]
        assert_same(sample, scores)
        hits.append(likeliest(scores) == 0)
    found = record["tasks"]["blimp"]
    assert found["questions"] == len(hits) == 2 * 67
    assert 0 < sum(hits) < len(hits)
    assert found["score"] == pytest.approx(sum(hits) / len(hits))
    assert len(found["parts"]) == 67


def test_piqa_is_that_of_plain_scoring(student, sets, tmp_path):
    record, samples = evaluated(student, sets, tmp_path, "piqa")
    hand, hits = ByHand(student), []
    _, records = read_local(sets, "piqa", ("",))
    for row, sample in zip(records[""]["validation"], samples, strict=True):
        prompt = f"Question: {row['goal']}\nAnswer:"
        scores = [hand.score(prompt, f" {row[name]}") for name in ("sol1", "sol2")]
        assert_same(sample, scores)
        hits.append(likeliest(scores) == row["label"])
    found = record["tasks"]["piqa"]
    assert (found["score"], found["score_stderr"]) == pytest.approx(mean_error(hits))
    assert found["metrics"]["acc_norm,none"]["value"] is not None


def test_lambada_is_that_of_plain_scoring(student, sets, tmp_path):
    record, samples = evaluated(student, sets, tmp_path, "lambada")
    hand, logs, hits = ByHand(student), [], []
    _, records = read_local(sets, "lambada", ("",))
    for row, sample in zip(records[""]["test"], samples, strict=True):
        before, _, last = row["text"].rpartition(" ")
        score = hand.score(before, f" {last}")
        assert_same(sample, [score])
        logs.append(score[0])
        hits.append(score[1])
    found = record["tasks"]["lambada"]
    assert found["score"] == pytest.approx(sum(hits) / len(hits))
    perplexity = found["metrics"]["perplexity,none"]
    mean, error = mean_error(logs)
    assert perplexity["value"] == pytest.approx(math.exp(-mean), rel=1e-4)
    assert perplexity["stderr"] == pytest.approx(math.exp(-mean) * error, rel=1e-3)


def test_mmlu_with_five_examples_is_that_of_plain_scoring(student, sets, tmp_path):
    record, samples = evaluated(student, sets, tmp_path, "mmlu")
    hand, hits = ByHand(student), []

    def block(row, answer):
        choices = "".join(f"\n{letter}. {row[1 + n]}" for n, letter in enumerate("ABCD"))
        return f"{row[0]}{choices}\nAnswer:{answer}"

    files = read_copy(sets / "mmlu.tar.xz")
    tables = {
        Path(name).stem: list(csv.reader(io.StringIO(data.decode())))[1:]
        for name, data in files.items()
    }
    # a part of them is enough, and hand scoring takes its time
    for sample in samples[::8]:
        part = sample["task"].removeprefix("mmlu_")
        topic = part.replace("_", " ")
        shown = "\n\n".join(block(row, f" {'ABCD'[int(row[5])]}") for row in tables[f"{part}_dev"])
        asked = tables[f"{part}_test"][sample["question"]]
        about = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
        prompt = f"{about}{shown}\n\n{block(asked, '')}"
        assert sample["prompt"] == prompt
        scores = [hand.score(prompt, f" {letter}") for letter in "ABCD"]
        assert_same(sample, scores)
        hits.append(likeliest(scores) == int(asked[5]))
        assert sample["scores"]["acc"] == hits[-1]
    found = record["tasks"]["mmlu"]
    assert found["cut_prompts"] == 0
    assert found["score"] == pytest.approx(
        sum(sample["scores"]["acc"] for sample in samples) / len(samples)
    )
    assert (found["shots"], found["questions"]) == (5, 2 * 57)


def test_heldout_loss_is_that_of_plain_scoring(student, small_corpus):
    request = asked(student, ("heldout",), corpus=[small_corpus.directory], window=500)
    (found,) = request.run()["heldout"].values()
    hand, total, tokens = ByHand(student), 0.0, 0
    documents = small_corpus.heldout_documents()
    for document in documents:
        for start in range(0, len(document.tokens) - 1, 500):
            ids = torch.from_numpy(document.tokens[start : start + 501])
            with torch.no_grad():
                logits = hand.model(ids[None, :-1]).logits[0].double()
            total += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
            tokens += len(ids) - 1
    size = sum(document.num_bytes for document in documents)
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)
    assert (found["tokens"], found["bytes"], found["same_tokenizer"]) == (tokens, size, True)
    assert found["loss_stderr"] > 0


def test_heldout_text_is_cut_anew_for_another_tokenizer(small_corpus, text_file, tmp_path):
    other = train_tokenizer([text_file.read_bytes()], 400)
    model = make_model(tmp_path / "other", other)
    request = asked(model, ("heldout",), corpus=[small_corpus.directory])
    (found,) = request.run()["heldout"].values()
    documents = small_corpus.heldout_documents()
    assert found["same_tokenizer"] is False
    assert found["bytes"] == sum(document.num_bytes for document in documents)
    assert found["tokens"] < sum(len(document.tokens) - 1 for document in documents)


# --- what models write --------------------------------------------------------------------------


def test_a_generated_answer_is_the_likeliest_and_counts_where_it_is_right(student, sets):
    """A model that answers all is asked: the harness' prompts, our filters, DROP's and BBH's."""

    class Oracle(CountingModel):
        right: bool = True

        def generate_until(self, requests, disable_tqdm=False):
            return [self.answer(one) for one in requests]

        def answer(self, one) -> str:
            if one.task_name.startswith("bbh"):
                return f" {one.doc['target']}"
            if one.task_name == "drop":
                return ",".join(one.doc["answers"][0])
            if one.task_name == "gsm8k":
                return f" so it is {one.doc['answer']}"
            return "    return a + b\n"

    oracle = Oracle(load_model(student), load_tokenizer(student), 4)
    for name in ("bbh", "drop", "gsm8k", "humaneval"):
        _, local = read_local(sets, name, part_names(SETS[name]))
        found, _ = run_set(SETS[name], oracle, local, shots=SETS[name].shots)
        assert found["score"] == 1, name
        assert found["questions"] == found["of_questions"]
    assert found["programs"] == {"passed": 2}


def test_the_likeliest_tokens_are_written(student, sets, tmp_path):
    _, samples = evaluated(student, sets, tmp_path, "drop", limit=2, shots={"drop": 0})
    hand = ByHand(student)
    for sample in samples:
        ids = hand.encode(sample["prompt"])
        written = ""
        for _ in range(8):
            with torch.no_grad():
                ids.append(hand.model(torch.tensor([ids])).logits[0, -1].argmax().item())
            written = hand.tokenizer.decode(ids[len(hand.encode(sample["prompt"])) :])
        kept = written.split(".")[0].removesuffix("<|endoftext|>")
        assert sample["responses"][0].startswith(kept) or kept.startswith(sample["responses"][0])


@pytest.mark.skipif(sandbox_problem() is not None, reason=str(sandbox_problem()))
def test_programs_run_only_when_allowed(student, sets, tmp_path, monkeypatch):
    ran = Counter()

    def count(program, limits=None):
        ran["programs"] += 1
        return run_program(program, limits)

    monkeypatch.setattr("capgap.evaluate.harness.run_program", count)
    record, samples = evaluated(student, sets, tmp_path, "humaneval")
    assert record["tasks"]["humaneval"] == {
        "missing": "runs programs that the model wrote, which allow_code allows",
        "score": None,
        "score_stderr": None,
    }
    assert (samples, ran["programs"]) == ([], 0)
    record, samples = evaluated(student, sets, tmp_path, "humaneval", allow_code=True)
    found = record["tasks"]["humaneval"]
    assert (found["score"], len(samples), ran["programs"]) == (0, 2, 2)
    assert sum(found["programs"].values()) == 2
    assert found["sandbox"] == "bwrap"
    assert found["max_gen_toks"] == {"asked": 1024, "used": POSITIONS // 2}


def test_no_program_is_asked_for_where_none_can_run(student, sets, tmp_path, monkeypatch):
    monkeypatch.setattr("capgap.evaluate.code_runner.SANDBOX", "no such program")
    monkeypatch.setattr(CountingModel, "generate_until", None)
    record, _ = evaluated(student, sets, tmp_path, "humaneval", allow_code=True)
    found = record["tasks"]["humaneval"]
    assert "install the system package bubblewrap" in found["missing"]
    assert found["score"] is None


# --- a short context ----------------------------------------------------------------------------


def test_prompts_longer_than_the_context_are_counted(small_corpus, sets, tmp_path):
    short = make_model(tmp_path / "short", small_corpus.tokenizer, positions=48)
    said = []
    request = asked(short, ("mmlu", "blimp", "gsm8k"), data=sets, limit=1)
    record = request.run(say=said.append)
    assert record["context"] == 48
    assert record["tasks"]["mmlu"]["cut_prompts"] == 57
    assert record["tasks"]["mmlu"]["parts"]["virology"]["cut_prompts"] == 1
    assert record["tasks"]["blimp"]["cut_prompts"] == 0
    assert record["tasks"]["gsm8k"]["cut_prompts"] == 1
    assert record["tasks"]["gsm8k"]["max_gen_toks"] == {"asked": 256, "used": 24}
    assert "mmlu: 57 of 57 prompts were cut to the 48 tokens that the model reads" in said


def test_an_answer_longer_than_the_context_leaves_the_set_missing(small_corpus, sets, tmp_path):
    short = make_model(tmp_path / "short", small_corpus.tokenizer, positions=4)
    record, _ = evaluated(short, sets, tmp_path, "piqa", "mmlu", limit=1)
    assert "more than the 4 that the model reads" in record["tasks"]["piqa"]["missing"]
    assert record["tasks"]["piqa"]["score"] is None
    assert record["tasks"]["mmlu"]["score"] is not None


def test_a_model_that_is_not_finite_has_no_scores(small_corpus, sets, tmp_path):
    folder = make_model(tmp_path / "broken", small_corpus.tokenizer)
    model = load_model(folder)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    save_model(model, folder, small_corpus.tokenizer)
    record, _ = evaluated(
        folder, sets, tmp_path, "piqa", "gsm8k", "heldout", corpus=[small_corpus.directory]
    )
    assert record["tasks"]["piqa"]["missing"].startswith("log-likelihoods are not finite")
    assert record["tasks"]["gsm8k"]["missing"].startswith("logits are not finite")
    assert record["tasks"]["gsm8k"]["score"] is None
    (loss,) = record["heldout"].values()
    assert (loss["loss"], loss["missing"]) == (None, "the loss is not finite")


# --- missing sets, the mean, the record ---------------------------------------------------------


def test_a_set_that_cannot_be_had_is_missing_and_the_others_go_on(student, sets, tmp_path, no_hub):
    folder = tmp_path / "some"
    folder.mkdir()
    shutil.copy(sets / "lambada.tar.xz", folder)
    record, _ = evaluated(student, folder, tmp_path, "ceval", "lambada")
    why = record["tasks"]["ceval"]["missing"]
    assert why == (
        f"no local copy in {folder}, and cannot reach the Hugging Face hub for the dataset "
        "'ceval/ceval-exam' (no network)"
    )
    assert record["tasks"]["ceval"]["score"] is None
    assert record["tasks"]["lambada"]["score"] is not None
    assert record["mean_percent"] is None
    assert why in record["mean_missing"]


def test_a_set_the_hub_cannot_load_is_missing(student, tmp_path, monkeypatch):
    monkeypatch.setattr("capgap.corpus.names.hub_revision", lambda name, *, kind: "abc")

    def fail(*_, **__):
        raise RuntimeError("the loader broke\nin two lines")

    monkeypatch.setattr("datasets.load_dataset", fail)
    record, _ = evaluated(student, None, tmp_path, "piqa")
    wanted = "baber/piqa cannot be loaded from the Hub: the loader broke"
    assert record["tasks"]["piqa"]["missing"] == wanted


def test_the_six_have_a_mean_a_picture_and_a_full_record(typed, student, sets, tmp_path):
    out, picture = tmp_path / "evaluate.json", tmp_path / "pareto.png"
    options = ("--data", sets, "--allow-code", "--device", "cpu", "--out", out)
    answer = typed("evaluate", student, *options, "--figure", picture, "--flops", "4e21")
    assert answer.code == 0, answer.err
    record = json.loads(out.read_text())
    scores = [record["tasks"][name]["score"] for name in SIX]
    assert record["mean_percent"] == pytest.approx(100 * sum(scores) / 6)
    assert record["mean_missing"] is None
    assert record["finished"] is True
    assert picture.stat().st_size > 10_000
    assert f"mean of the six: {record['mean_percent']:.2f}" in answer.out
    assert "MiniMA-3B" in answer.out
    shots = {name: record["tasks"][name]["shots"] for name in SIX}
    assert shots == dict(zip(SIX, (5, 5, 3, 0, 3, 8), strict=True))
    source = record["tasks"]["mmlu"]["source"]
    assert source["path"] == str(sets / "mmlu.tar.xz")
    assert len(source["sha256"]) == 64
    assert record["versions"]["lm_eval"].startswith("0.4.")
    told(record)


def told(record):
    """Every key of the record is told in docs/evaluation.md."""
    from test_docs import assert_told, keys

    one = dict(record["tasks"]["mmlu"])
    one["parts"] = {"PART": one["parts"]["virology"]}
    humaneval = record["tasks"]["humaneval"]
    one |= {key: humaneval[key] for key in ("max_gen_toks", "programs", "sandbox")}
    one["metrics"] = {"NAME": one["metrics"]["acc,none"]}
    one["programs"] = {"REASON": 1}
    heldout = {"CORPUS": dict.fromkeys(HELDOUT_KEYS)}
    whole = record | {"tasks": {"TASK": one}, "heldout": heldout}
    whole.pop("checksum", None)
    assert_told(whole, keys("evaluation.md", "The record"))


HELDOUT_KEYS = (
    *("loss", "loss_stderr", "bits_per_byte", "bits_per_byte_stderr", "tokens", "bytes"),
    *("missing", "documents", "window", "same_tokenizer", "corpus_hash"),
)


def test_held_out_keys_are_those(student, small_corpus):
    record = asked(student, ("heldout",), corpus=[small_corpus.directory]).run()
    (found,) = record["heldout"].values()
    assert set(found) == set(HELDOUT_KEYS)
    assert (record["tasks"], record["mean_percent"], record["mean_missing"]) == ({}, None, None)


def full(**changes):
    one = {"missing": None, "score": 0.5}
    return {name: one | {"shots": SETS[name].shots} for name in SIX} | changes


def test_the_mean_stands_for_the_whole_six_alone():
    assert six_mean(full(), limit=None) == (50, None)
    lacking = {name: one for name, one in full().items() if name not in ("drop", "bbh")}
    assert six_mean(lacking, limit=None) == (None, "without drop, bbh")
    missing = full(drop={"missing": "no network", "score": None})
    assert six_mean(missing, limit=None) == (None, "drop: no network")
    assert six_mean(full(), limit=5) == (None, "limit 5 asks no whole sets")
    other = full(mmlu={"missing": None, "score": 0.5, "shots": 0})
    assert six_mean(other, limit=None) == (None, "mmlu with 0 shots, not 5")


def test_only_whole_sets_with_their_own_shots_stand_beside_published_scores():
    """Of a set of which --limit asked a part, nothing stands beside a published score."""
    one = {"missing": None, "score": 0.5, "score_stderr": 0.01, "questions": 100}
    sets = {
        name: one | {"shots": SETS[name].shots, "of_questions": 100} for name in ("mmlu", "gsm8k")
    }
    assert comparable(sets) == ["mmlu", "gsm8k"]
    sets["gsm8k"] |= {"questions": 10}
    assert comparable(sets) == ["mmlu"]
    sets["mmlu"] |= {"shots": 0}
    assert comparable(sets) == []


def test_parts_are_put_together_by_question_or_by_part():
    parts = {
        "a": Part({"acc,none": (0.5, 0.1)}, 10, 10, 1),
        "b": Part({"acc,none": (0.8, 0.2)}, 30, 40, 2),
    }
    mmlu = combine(SETS["mmlu"], parts)
    assert (mmlu["score"], mmlu["score_stderr"]) == pytest.approx((0.725, math.hypot(1, 6) / 40))
    assert (mmlu["questions"], mmlu["of_questions"], mmlu["cut_prompts"]) == (40, 50, 3)
    blimp = combine(SETS["blimp"], parts)
    assert blimp["metrics"]["acc,none"] == {
        "value": pytest.approx(0.65),
        "stderr": pytest.approx(math.hypot(0.1, 0.2) / 2),
    }
    parts["b"] = Part({"acc,none": (0.8, None)}, 1, 1, 0)
    assert combine(SETS["mmlu"], parts)["score_stderr"] is None


def test_flops_are_read_from_the_distillation_that_wrote_the_student(tmp_path):
    folder = tmp_path / "run/students/small"
    folder.mkdir(parents=True)
    assert known_flops(str(folder)) is None
    (tmp_path / "run/distill.json").write_text(json.dumps({"finished": True, "flops": 12}))
    assert known_flops(str(folder)) == 12
    assert known_flops(str(tmp_path)) is None
    # those of the whole run are not those of its best moment, nor of one student among others
    assert known_flops(str(tmp_path / "run/best/small")) is None
    found = {"finished": True, "flops": 12, "after": {"small": {}}}
    (tmp_path / "run/distill.json").write_text(json.dumps(found))
    assert known_flops(str(folder)) == 12
    found["after"]["large"] = {}
    (tmp_path / "run/distill.json").write_text(json.dumps(found))
    assert known_flops(str(folder)) is None
    options = {"model": "m", "figure": "a.png"}
    assert Evaluate(**options, flops="4e21").flops == 4e21


# --- going on -----------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """Names of the sets that the harness was asked for, and how many held-out losses were taken."""
    asked = []

    def note(one, *more, **options):
        asked.append(one.name)
        return run_set(one, *more, **options)

    monkeypatch.setattr("capgap.evaluate.harness.run_set", note)
    plain = losses.evaluate_heldout

    def lost(*arguments):
        asked.append("heldout")
        return plain(*arguments)

    monkeypatch.setattr(losses, "evaluate_heldout", lost)
    return asked


def without_time(record):
    tasks = {
        name: {key: value for key, value in one.items() if key != "seconds"}
        for name, one in record["tasks"].items()
    }
    return record | {"tasks": tasks}


def test_a_stopped_evaluation_goes_on(
    student, sets, tmp_path, small_corpus, measured, monkeypatch, no_hub
):
    tasks = ("heldout", "lambada", "piqa", "blimp")
    corpus = [small_corpus.directory]
    whole = tmp_path / "whole"
    whole.mkdir()
    expected, samples = evaluated(student, sets, whole, *tasks, corpus=corpus)

    out = tmp_path / "record.json"
    plain = CountingModel.loglikelihood

    def killed(self, requests, **options):
        if measured[-1] in dying:
            raise KeyboardInterrupt
        return plain(self, requests, **options)

    dying = {"piqa"}

    del measured[:]
    with monkeypatch.context() as patched:
        patched.setattr(CountingModel, "loglikelihood", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluated(student, sets, tmp_path, *tasks, corpus=corpus, out=out)
    assert measured == ["heldout", "lambada", "piqa"]
    stopped = json.loads(out.read_text())
    assert (stopped["finished"], list(stopped["tasks"])) == (False, ["lambada"])
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"set": "piqa", "task": "of a set that was not finished"}\n{"set": "la')
    del measured[:]
    told = []
    lines = tmp_path / "samples.jsonl"
    request = asked(student, tasks, data=sets, batch_size=3, corpus=corpus, out=out, samples=lines)
    record = request.run(say=told.append)
    assert measured == ["piqa", "blimp"]
    assert "lambada: was measured before" in told
    assert without_time(record) == without_time(expected)
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert found == samples
    assert list(record["tasks"]) == ["lambada", "piqa", "blimp"]
    # stopped in a set that comes before those that it has, twice
    dying = {"gsm8k", "mmlu"}
    again = request.but(tasks=("mmlu", *tasks))
    for _ in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(CountingModel, "loglikelihood", killed)
            with pytest.raises(KeyboardInterrupt):
                again.run()
        kept = json.loads(out.read_text())
        assert set(kept["tasks"]) == {"lambada", "piqa", "blimp"}
        assert kept["heldout"] == record["heldout"]
    # all is there: the model is not even loaded
    del measured[:]
    monkeypatch.setattr("capgap.models.build.load_model", None)
    assert without_time(request.run()) == without_time(expected)
    assert measured == []


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_where_it_is(
    typed, student, small_corpus, sets, tmp_path, monkeypatch, stop
):
    def stopped(self, requests, **options):
        signal.raise_signal(stop)

    monkeypatch.setattr(CountingModel, "loglikelihood", stopped)
    out = tmp_path / "record.json"
    options = ("--corpus", small_corpus.directory, "--data", sets, "--out", out)
    # as in a terminal, also where the tests run in the background and the signal is ignored
    before = signal.signal(stop, signal.default_int_handler)
    try:
        answer = typed("evaluate", student, "--tasks", "heldout,piqa", *options)
    finally:
        signal.signal(stop, before)
    assert answer.code == 128 + stop
    told = f"capgap: stopped; what is done is kept in {out}, the same command continues"
    assert answer.err.splitlines()[-1] == told
    assert json.loads(out.read_text())["heldout"]


def test_what_would_be_another_measurement_is_made(
    student, small_corpus, sets, tmp_path, measured, no_hub
):
    own = tmp_path / "own"
    own.mkdir()
    write_folder(own / "gsm8k", files_of("gsm8k"))
    out = tmp_path / "record.json"

    def again(model=student, **options):
        del measured[:]
        request = asked(model, ("gsm8k", "lambada"), data=own, out=out, **options)
        record = request.run()
        return list(measured), record

    assert again()[0] == ["gsm8k"]
    assert again()[0] == []
    assert again(batch_size=2)[0] == []
    # a set that was missing is looked for once more
    shutil.copy(sets / "lambada.tar.xz", own)
    assert again()[0] == ["lambada"]
    assert again(shots={"gsm8k": 1})[0] == ["gsm8k"]
    assert again(shots={"gsm8k": 1}, limit=2)[0] == ["gsm8k", "lambada"]
    assert again()[0] == ["gsm8k", "lambada"]
    # lines that nobody has
    assert again(samples=tmp_path / "lines.jsonl")[0] == ["gsm8k", "lambada"]
    assert again(samples=tmp_path / "lines.jsonl")[0] == []
    assert again(dtype="bf16")[0] == ["gsm8k", "lambada"]
    (file,) = own.rglob("test.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[1:], lines[0]]))
    assert again(dtype="bf16")[0] == ["gsm8k"]
    other = make_model(tmp_path / "other", small_corpus.tokenizer, seed=4)
    assert again(other, dtype="bf16")[0] == ["gsm8k", "lambada"]
    # no record
    out.write_text("[1")
    assert again(other)[0] == ["gsm8k", "lambada"]


# --- local copies -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [one for one in SETS if SETS[one].has_parts])
def test_parts_are_called_as_their_records_are(name):
    """The harness' task NAME_PART reads the part PART of the set."""
    empty = {part: {} for part in part_names(SETS[name])}
    assert len(empty) == {"mmlu": 57, "ceval": 52, "blimp": 67}.get(name, 27)
    folder = SETS[name].folder
    import lm_eval.tasks

    for file in (Path(lm_eval.tasks.__file__).parent / folder).glob("*.yaml"):
        lines = [line.replace('"', "") for line in file.read_text().splitlines()]
        facts = dict(line.split(": ", 1) for line in lines if ": " in line and line[0].isalpha())
        if "dataset_name" in facts:
            part = facts["dataset_name"].strip()
            assert facts["task"].strip() == SETS[name].task + part
            assert part in empty


def test_a_folder_reads_as_its_archive(sets, tmp_path):
    for name in READERS:
        parts = part_names(SETS[name])
        copy = sets / (name if name == "piqa" else f"{name}.tar.xz")
        folder = tmp_path / "unpacked"
        write_folder(folder / name, read_copy(copy))
        assert read_local(folder, name, parts)[1] == read_local(sets, name, parts)[1]
    assert read_local(tmp_path, "mmlu", ("virology",)) is None


def test_drop_becomes_what_the_task_reads(sets):
    _, local = read_local(sets, "drop", ("",))
    tasks = load_tasks(SETS["drop"], local, 3, outcomes=Counter())
    documents = list(tasks["drop"].validation_docs())
    assert len(documents) == 6
    assert [document["answers"] for document in documents[:6:2]] == [
        [["3"]],
        [["lo"], ["3"]],
        [["1 May"], ["3"]],
    ]


def test_mmlu_as_it_was_first_published(tmp_path):
    row = "What is it?,a,b,c,d,C\n"
    write_folder(tmp_path / "mmlu", {f"virology_{split}.csv": row for split in ("dev", "test")})
    _, local = read_local(tmp_path, "mmlu", ("virology",))
    wanted = {"question": "What is it?", "choices": ["a", "b", "c", "d"], "answer": 2}
    assert local["virology"]["test"] == [wanted]


def test_characters_that_part_lines_elsewhere_stand_within_texts(tmp_path):
    line = json.dumps({"text": "one\u2028two\x85three"}, ensure_ascii=False)
    write_folder(tmp_path / "lambada", {"lambada_test.jsonl": f"{line}\r\n\n{line}\n"})
    _, local = read_local(tmp_path, "lambada", ("",))
    assert local[""]["test"] == 2 * [{"text": "one\u2028two\x85three"}]


@pytest.mark.parametrize(
    ("name", "kind", "fault"),
    [
        ("../out", tarfile.REGTYPE, "outside of the archive"),
        ("/etc/out", tarfile.REGTYPE, "outside of the archive"),
        ("data/../../out", tarfile.REGTYPE, "outside of the archive"),
        ("way", tarfile.SYMTYPE, "a link"),
        ("way", tarfile.LNKTYPE, "a link"),
        ("device", tarfile.CHRTYPE, "a device or a pipe"),
        ("pipe", tarfile.FIFOTYPE, "a device or a pipe"),
    ],
)
def test_archives_that_reach_outside_are_refused(typed, student, tmp_path, name, kind, fault):
    with tarfile.open(tmp_path / "piqa.tar.xz", "w:xz") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member, io.BytesIO())
    answer = typed("evaluate", student, "--tasks", "piqa", "--data", tmp_path)
    assert answer.code == 2
    assert answer.err == (
        f"capgap: {tmp_path}/piqa.tar.xz is refused: its member {name!r} is {fault}; get it "
        "from its publisher\n"
    )


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("piqa", {"valid-labels.lst": "0\n"}, "valid-labels.lst: zip() argument 2 is shorter"),
        ("piqa", {"valid.jsonl": '{"goal": "a"}\n'}, "valid.jsonl: no 'sol1'"),
        ("lambada", {"lambada_test.jsonl": "{"}, "lambada_test.jsonl: Expecting property name"),
        ("lambada", {"lambada_test.jsonl": ""}, "is empty (test)"),
        ("mmlu", {"data/mmlu/test/virology_test.csv": None}, "lacks virology_test.csv"),
        ("mmlu", {"data/mmlu/dev/virology_dev.csv": "a,b,c,d,e,9\n"}, "'9' is no choice"),
        ("blimp", {"data/passive_1.jsonl": None}, "lacks passive_1.jsonl: get the whole set"),
        ("humaneval", {"data/HumanEval.jsonl.gz": b"no gzip"}, "HumanEval.jsonl.gz: Not a gzip"),
        ("drop", {"drop_dataset_dev.json": "[]"}, "drop_dataset_dev.json: "),
    ],
)
def test_a_broken_copy_is_one_line(typed, student, tmp_path, name, changes, line):
    files = files_of(name) | changes
    kept = {path: data for path, data in files.items() if data is not None}
    write_folder(tmp_path / name, kept)
    options = ("--tasks", name, "--data", tmp_path, "--allow-code")
    answer = typed("evaluate", student, *options)
    assert answer.code == 2
    assert line in answer.err
    assert answer.err.count("\n") == 1


def test_a_damaged_archive_is_one_line(typed, student, sets, tmp_path):
    whole = (sets / "lambada.tar.xz").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no archive"):
        (tmp_path / "lambada.tar.xz").write_bytes(damaged)
        answer = typed("evaluate", student, "--tasks", "lambada", "--data", tmp_path)
        assert answer.code == 2
        assert answer.err.startswith(f"capgap: cannot read the archive {tmp_path}/lambada.tar.xz")
        assert answer.err.count("\n") == 1


# --- bad input ----------------------------------------------------------------------------------


def test_tasks_and_shots_are_read():
    assert asked("m", " piqa, mmlu,piqa").tasks == ("piqa", "mmlu")
    request = asked("m", "mmlu,gsm8k,piqa", shots=["mmlu=0", "gsm8k=4"])
    assert [request.shots_of(name) for name in request.tasks] == [0, 4, 0]
    assert asked("m", "mmlu", shots={"mmlu": 2}).shots_of("mmlu") == 2
    assert set(NAMES) == {*SETS, "heldout"}


def test_a_request_is_its_command_line():
    request = asked("m", ("mmlu", "heldout"), corpus=["a", "b"], shots=["mmlu=0"], allow_code=True)
    words = ["evaluate", "m", "--tasks", "mmlu,heldout", "--shots", "mmlu=0", "--allow-code"]
    words += ["--corpus", "a", "--corpus", "b", "--device", "cpu"]
    assert request.command() == words
    assert Evaluate(model="m").tasks == SIX
    assert EvaluateSection().tasks == ("heldout",)
    assert "batch_size" not in request.identity()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--tasks", "mlmu"), "unknown task 'mlmu': did you mean mmlu? there are mmlu, ceval"),
        (("--tasks", "GSM8K"), "unknown task 'GSM8K': did you mean gsm8k?"),
        (("--tasks", "xyzzy"), "unknown task 'xyzzy': there are"),
        (("--tasks", ","), "--tasks ',': names no task"),
        (("--tasks", "piqa", "--shots", "piqa"), "write 'piqa' as NAME=NUMBER"),
        (("--tasks", "piqa", "--shots", "piqa=1"), "--shots ['piqa=1']: piqa takes 0"),
        (("--tasks", "mmlu", "--shots", "mmlu=6"), "--shots ['mmlu=6']: mmlu takes 0 to 5"),
        (("--tasks", "mmlu", "--shots", "gsm8k=6"), "gsm8k is not among the tasks mmlu"),
        (("--tasks", "piqa", "--limit", "0"), "--limit '0' is no count: give a positive"),
        (("--tasks", "piqa", "--batch-size", "0"), "--batch-size '0' is no count"),
        (("--tasks", "piqa", "--window", "0"), "--window '0' is no count"),
        (("--tasks", "piqa", "--dtype", "fp8"), "--dtype 'fp8': Input should be 'stored', 'fp32'"),
        (("--tasks", "piqa", "--data", "nowhere"), "--data nowhere is no folder"),
        (("--tasks", "heldout"), "tasks heldout and corpus FOLDER go together"),
        (("--tasks", "piqa", "--corpus", "."), "tasks heldout and corpus FOLDER go together"),
        (("--tasks", "heldout", "--corpus", "."), ". holds no prepared corpus"),
        (("--tasks", "piqa", "--flops", "4e21"), "flops is of use with figure alone"),
        (("--tasks", "piqa", "--figure", "a.png"), "--figure needs the FLOPs"),
        (("--tasks", "piqa", "--figure", "a.pdf", "--flops", "1"), "give a name in .png or .svg"),
        (("--tasks", "piqa", "--figure", "a.png", "--flops", "many"), "--flops 'many'"),
        (("--tasks", "piqa", "--out", "nowhere/a.json"), "--out nowhere/a.json: give the name"),
    ],
)
def test_wrong_options_are_one_line(typed, student, tmp_path, monkeypatch, options, line):
    monkeypatch.chdir(tmp_path)
    answer = typed("evaluate", student, *options)
    assert answer.code == 2
    assert answer.err.startswith("capgap: ")
    assert line in answer.err
    assert answer.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_read_are_one_line(typed, student, sets, tmp_path):
    pickled = tmp_path / "pickled"
    shutil.copytree(student, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    for model, line in (
        (pickled, "is a pickle, which can run any code when it is read): convert the model"),
        (tmp_path / "nothing", "is no model folder"),
        (sets, "no tokenizer in"),
    ):
        answer = typed("evaluate", model, "--tasks", "piqa", "--data", sets)
        assert answer.code == 2, model
        assert line in answer.err
        assert answer.err.count("\n") == 1


@pytest.mark.parametrize(
    ("version", "line"),
    [
        (None, f"benchmarks need lm-evaluation-harness: {install_command('evaluate')}"),
        ("0.4.5", "lm-eval 0.4.5 is another one than is known here: pip install"),
        ("1.0rc1", "lm-eval 1.0rc1 is another one"),
    ],
)
def test_without_the_harness_the_extra_is_named(
    typed, student, sets, monkeypatch, tmp_path, small_corpus, version, line
):
    import importlib.metadata as metadata

    real = metadata.version

    def versions(name):
        if name != "lm_eval":
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr("importlib.metadata.version", versions)
    monkeypatch.chdir(tmp_path)
    answer = typed("evaluate", student, "--tasks", "piqa", "--data", sets)
    assert answer.code == 2
    assert line in answer.err
    # held-out loss needs none
    options = ("--tasks", "heldout", "--corpus", small_corpus.directory, "--device", "cpu")
    assert typed("evaluate", student, *options).code == 0


def test_nothing_measured_is_told_and_no_picture_is_drawn(
    typed, student, tmp_path, monkeypatch, no_hub, sets
):
    monkeypatch.chdir(tmp_path)
    answer = typed("evaluate", student, "--tasks", "ceval")
    assert (answer.code, answer.err.splitlines()[-1]) == (1, "capgap: nothing was measured")
    assert json.loads(Path("evaluate.json").read_text())["tasks"]["ceval"]["score"] is None
    options = ("--tasks", "piqa", "--data", sets, "--figure", "a.png", "--flops", "1e20")
    answer = typed("evaluate", student, *options)
    wanted = "capgap: no picture: none of the six benchmarks was asked for"
    assert (answer.code, answer.err.splitlines()[-1]) == (1, wanted)
    assert not Path("a.png").exists()


def test_all_is_as_before_afterwards(student, sets, tmp_path):
    import logging

    import datasets
    import lm_eval.api.task

    before = (
        logging.getLogger("lm_eval").level,
        lm_eval.api.task.tqdm,
        datasets.are_progress_bars_disabled(),
    )
    evaluated(student, sets, tmp_path, "piqa", limit=2)
    assert before == (
        logging.getLogger("lm_eval").level,
        lm_eval.api.task.tqdm,
        datasets.are_progress_bars_disabled(),
    )


def test_how_far_it_is_is_told(student, sets, monkeypatch):
    monkeypatch.setattr("capgap.evaluate.harness.SAID_EVERY", -1.0)
    said: list[str] = []
    model = CountingModel(load_model(student), load_tokenizer(student), 4)
    _, local = read_local(sets, "piqa", ("",))
    run_set(SETS["piqa"], model, local, shots=0, limit=2, say=said.append)
    assert "piqa: 2 prompts made" in said
    assert "piqa: 4 of 4 requests cut into tokens" in said
    assert "piqa: 4 of 4 answers" in said


# --- the page -----------------------------------------------------------------------------------


def test_the_first_run_of_the_page(typed, student, sets, tmp_path, monkeypatch, no_hub, text_file):
    from test_docs import DOCS, code_blocks, sections

    monkeypatch.chdir(tmp_path)
    shutil.copy(text_file, "stories.txt")
    Path("sets").mkdir()
    for name in ("blimp.tar.xz", "piqa"):
        Path("sets", name).symlink_to(sets / name)
    page = sections((DOCS / "evaluation.md").read_text())["A first run"]
    (block,) = code_blocks(page, "console")
    commands = [line.split() for line in block.splitlines()]
    answers = []
    for place, command in enumerate(commands):
        assert command[0] == "capgap"
        answers.append(typed(*command[1:]))
        if place == 0:
            make_model(Path("student"), load_tokenizer("tokens/tokenizer"))
    assert [answer.code for answer in answers] == [0, 0, 0, 1]
    assert "held-out loss on tokens: " in answers[1].out
    assert "BLiMP" in answers[2].out
    assert "ceval: missing, no local copy in sets, and cannot reach the" in answers[3].out
    assert {path.name for path in tmp_path.glob("*.json")} == {
        "heldout.json",
        "two.json",
        "six.json",
    }
