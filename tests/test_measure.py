"""Models on the user's text: losses per byte, entropy, calibration, and what advice makes of it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from capgap.corpus.excerpt import excerpt
from capgap.corpus.text import Text
from capgap.corpus.tokenizer import TokenCodec, train_tokenizer
from capgap.corpus.tokens import HeldoutDocument, Marks
from capgap.distill.head import HeadInput
from capgap.errors import UserError
from capgap.evaluate.losses import heldout_set, measure_model, token_statistics
from capgap.evaluate.measured import Measured, Measurement, calibration_error
from capgap.law.advise import recommend
from capgap.law.published import Candidate, candidates_of
from capgap.models.build import build_model, save_model
from capgap.models.parts import Parts
from capgap.models.shape import ladder_shape
from capgap.report.advice import advice_sentences
from capgap.stages.measure import run_measure
from conftest import made_up_text
from lively import in_double

WINDOW = 8
WORDS = 50
BEGUN = Marks(1, 1, begin_windows=True)


def model_of(architecture="llama", *, size=8000, words=WORDS, positions=64, seed=0, tied=True):
    shape = ladder_shape(architecture, size, vocabulary=words, positions=positions)
    return build_model(replace(shape, tied=tied), seed=seed)


def documents_of(lengths):
    chooser = np.random.default_rng(0)
    return [
        HeldoutDocument(np.r_[1, chooser.integers(2, WORDS, length)].astype(np.int64), 3 * length)
        for length in lengths
    ]


def uniform(model):
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    return model


# --- one model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_loss_entropy_and_confidence_are_those_of_transformers_logits(architecture, monkeypatch):
    """Gemma 2 caps its logits; of both, the last words stand for no token."""
    in_double(monkeypatch)
    model = model_of(architecture, words=WORDS + 3).double().eval()
    documents = documents_of([1, 7, 8, 9, 30])
    found = measure_model(Parts(model), heldout_set(documents, BEGUN, WINDOW, WORDS))
    sure, hits = [], []
    for place, (tokens, _) in enumerate(documents):
        loss = entropy = 0.0
        for start in range(1, len(tokens), WINDOW):
            targets = tokens[start : start + WINDOW]
            inputs = torch.from_numpy(np.r_[tokens[0], targets[:-1]])
            with torch.no_grad():
                logits = model(inputs[None]).logits[0, :, :WORDS].numpy()
            chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            entropy -= (chances * np.log(chances)).sum()
            loss -= np.log(chances[np.arange(len(targets)), targets]).sum()
            sure += chances.max(1).tolist()
            hits += (chances.argmax(1) == targets).tolist()
        assert found.document_losses[place] == pytest.approx(loss, rel=1e-12)
        assert found.document_entropies[place] == pytest.approx(entropy, rel=1e-12)
    assert found.calibration_error == pytest.approx(calibration_error(sure, hits), rel=1e-12)
    assert (found.tokens, found.bytes) == (55, 165)
    assert found.nats_per_byte == pytest.approx(found.loss / 3)


def test_chunks_change_nothing():
    chooser = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 6, generator=chooser, dtype=torch.float64)
    weight = torch.randn(WORDS, 6, generator=chooser, dtype=torch.float64)
    targets = torch.randint(0, WORDS, (40,), generator=chooser)
    source = HeadInput(hidden, weight, logit_scale=0.5, softcap=3.0)
    whole, parts = (token_statistics(source, targets, chunk_tokens=size) for size in (40, 7))
    for name in ("losses", "entropies", "confidence", "correct"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), rtol=1e-12, atol=0)


def test_a_model_that_knows_nothing_has_the_entropy_of_its_words():
    found = measure_model(
        Parts(uniform(model_of(tied=False))), heldout_set(documents_of([20, 30]), BEGUN, 16)
    )
    assert found.entropy == pytest.approx(math.log(WORDS), rel=1e-6)
    assert found.loss == pytest.approx(math.log(WORDS), rel=1e-6)
    assert found.overconfidence == pytest.approx(0, abs=1e-5)


def test_a_model_in_training_stays_so():
    model = model_of().train()
    measure_model(Parts(model), heldout_set(documents_of([5]), BEGUN, 8))
    assert model.training


def test_calibration_of_a_known_table():
    # two bins of ten: 0.9 sure and right 3 of 4 times, 0.5 sure and right 1 of 2 times
    sure = [0.9, 0.9, 0.9, 0.9, 0.5, 0.5]
    hits = [True, True, True, False, True, False]
    assert calibration_error(sure, hits, bins=10) == pytest.approx(4 / 6 * 0.15)
    # too sure and not sure enough do not cancel over bins, but within one they do
    assert calibration_error([0.9, 0.3], [False, True], bins=10) == pytest.approx((0.9 + 0.7) / 2)
    assert calibration_error([0.9, 0.3], [False, True], bins=1) == pytest.approx(0.1)
    # an upper end belongs to its bin
    assert calibration_error([0.5, 0.4], [True, False], bins=2) == pytest.approx(0.05)
    assert calibration_error([1.0], [True]) == 0


def measured(losses, *, sizes=None, entropies=None, changed=0):
    sizes = sizes or [100] * len(losses)
    tokens = [size // 4 for size in sizes]
    return Measured(
        list(losses),
        tokens,
        sizes,
        document_entropies=list(entropies or losses),
        calibration_error=0.1,
        changed_documents=changed,
        seconds=1.0,
    )


def test_differences_are_paired_by_document():
    chooser = np.random.default_rng(2)
    sizes = chooser.integers(200, 4000, 60)
    hard = sizes * (1 + 0.3 * chooser.standard_normal(60))
    worse = hard + sizes * (0.05 + 0.01 * chooser.standard_normal(60))
    first, second = (measured(losses, sizes=sizes.tolist()) for losses in (hard, worse))
    above, error = second.above(first)
    assert above == pytest.approx((worse - hard).sum() / sizes.sum())
    drawn = chooser.integers(0, 60, (4000, 60))
    bootstrap = ((worse - hard)[drawn].sum(1) / sizes[drawn].sum(1)).std()
    assert error == pytest.approx(bootstrap, rel=0.1)
    # far below the error of either alone
    assert error < 0.1 * second.as_dict()["nats_per_byte_stderr"]
    assert measured([5.0]).above(measured([4.0])) == (pytest.approx(0.01), None)


# --- the text -----------------------------------------------------------------------------------


def test_a_sample_is_what_a_corpus_of_the_same_text_holds_out(text_file, small_corpus: Text):
    assert excerpt(str(text_file), 5000) == excerpt(str(text_file), 5000)
    texts = [text for text, _ in excerpt(str(text_file), 5000)]
    assert 4000 < sum(map(len, texts)) <= 5000
    codec = TokenCodec(small_corpus.tokenizer)
    heldout = [codec.decode(one.tokens[1:]) for one in small_corpus.heldout_documents()]
    for text, held in zip(texts, heldout, strict=False):
        assert text.startswith(held) or held.startswith(text)
    prepared = excerpt(str(small_corpus.directory), 10**9)
    assert [text for text, _ in prepared] == heldout
    whole = [entry["whole"] for entry in small_corpus.sources[0].manifest["heldout"]["evaluated"]]
    assert [one.whole for one in prepared] == whole


def test_a_sample_takes_many_documents_and_only_their_beginnings(tmp_path):
    for place in range(30):
        (tmp_path / f"{place}.txt").write_bytes(b"%d " % place * 20_000)
    texts = excerpt(str(tmp_path), 40_000)
    assert len(texts) == 10
    assert all(3900 < len(text) <= 4096 and not whole for text, whole in texts)
    everything = excerpt(str(tmp_path), 10**8)
    assert len(everything) == 30
    assert all(len(text) >= 40_000 and whole for text, whole in everything)


def test_a_sample_is_valid_text(tmp_path):
    (tmp_path / "odd.txt").write_bytes(b"caf\xc3\xa9 \xff\xfe done")
    assert excerpt(str(tmp_path), 100) == [("café  done".encode(), True)]
    (tmp_path / "odd.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="holds no text"):
        excerpt(str(tmp_path), 100)


# --- models of several tokenizers ---------------------------------------------------------------


def saved(folder: Path, tokenizer, *, size=8000, positions=64, even=False, seed=0):
    words = max(tokenizer.get_vocab().values()) + 1
    model = model_of(size=size, words=words, positions=positions, seed=seed, tied=not even)
    save_model(uniform(model) if even else model, folder, tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def bytewise():
    return train_tokenizer([b"nothing to merge"], 257)


@pytest.fixture(scope="module")
def models(tmp_path_factory, small_corpus: Text, bytewise):
    """Two that know nothing, of different tokenizers, and two that have learned nothing yet."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = small_corpus.tokenizer
    return {
        "bytes": saved(folder / "bytes", bytewise, even=True),
        "pieces": saved(folder / "pieces", tokenizer, size=14_000, even=True),
        "small": saved(folder / "small", tokenizer, size=20_000),
        "large": saved(folder / "large", tokenizer, size=40_000, positions=32),
    }


def test_two_tokenizers_read_the_same_bytes(models, text_file):
    pair = {name: models[name] for name in ("bytes", "pieces")}
    found = run_measure(str(text_file), pair, num_bytes=3000)
    of_bytes, of_pieces = found.models["bytes"], found.models["pieces"]
    assert of_bytes.document_bytes == of_pieces.document_bytes
    # one token a byte and one for the end of a whole document; knowing nothing costs all the same
    whole = sum(one.whole for one in excerpt(str(text_file), 3000))
    assert of_bytes.tokens == of_bytes.bytes + whole
    assert of_bytes.loss == pytest.approx(math.log(257), rel=1e-6)
    ratio = of_pieces.tokens / of_pieces.bytes
    assert ratio < 0.6
    assert of_pieces.nats_per_byte == pytest.approx(math.log(300) * ratio, rel=1e-6)
    assert of_pieces.changed_documents == 0
    assert found.window == 64


def test_all_read_in_the_shortest_context(models, text_file):
    found = run_measure(str(text_file), models, num_bytes=1000)
    assert found.window == 32
    assert list(found.models) == list(models)


def test_a_tokenizer_that_loses_text_is_counted(bytewise, tmp_path, text_file):
    from tokenizers import normalizers

    lower = train_tokenizer([b"nothing to merge"], 257)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    lower_model = {"lower": saved(tmp_path / "lower", lower)}
    found = run_measure(str(text_file), lower_model, num_bytes=2000)
    lost = found.models["lower"]
    assert lost.changed_documents == len(lost.document_bytes)


# --- advice -------------------------------------------------------------------------------------

BILLION = 10**9
SMALL = Candidate("small", 7 * BILLION, 7 * BILLION, 2000 * BILLION)
LARGE = Candidate("large", 12 * BILLION, 12 * BILLION, 2000 * BILLION)


def advice(losses, candidates=(SMALL, LARGE), student=5 * BILLION):
    """`losses`: by name, of every document."""
    models = {name: measured(values) for name, values in losses.items()}
    measurement = Measurement("text/", 1024, "stored", "cpu", models)
    return recommend(student, 100 * BILLION, candidates, measurement=measurement)


def row_of(found, name):
    return next(row for row in found.recommendations if row.teacher == name)


def test_a_larger_model_that_reads_worse_is_named_and_not_taken():
    # alone the sizes speak for the larger one
    by_size = recommend(5 * BILLION, 100 * BILLION, [SMALL, LARGE])
    assert by_size.take == "large"
    found = advice({"small": [60.0, 64.0, 62.0], "large": [60.3, 64.2, 62.4]})
    assert [row.teacher for row in found.recommendations] == ["small", "large"]
    caution = row_of(found, "large").cautions[-1]
    assert caution.startswith("no better than small, which is smaller: its own loss is 0.0030 nat")
    assert "paired standard error 0.0006" in caution
    assert row_of(found, "large").measured.no_better_than == "small"
    assert row_of(found, "small").measured.no_better_than is None
    told = " ".join(advice_sentences(found))
    assert "large, but it reads your text no better than small" in told


def test_a_larger_model_that_reads_better_is_taken_and_noise_is_told():
    clear = advice({"small": [60.0, 64.0, 62.0], "large": [59.7, 63.8, 61.6]})
    assert clear.take == "large"
    assert row_of(clear, "large").cautions == ()
    noisy = advice({"small": [60.0, 64.0, 62.0], "large": [59.0, 64.9, 61.9]})
    assert "by 0.0007 nats/byte only, which may be noise" in row_of(noisy, "large").cautions[0]
    alone = advice({"small": [60.0], "large": [59.0]})
    assert "its noise is not known" in row_of(alone, "large").cautions[0]
    assert row_of(alone, "large").measured.nats_per_byte_stderr is None


def test_the_own_loss_decides_where_it_is_far_apart():
    """Beyond the surface's error no line of sizes can bring a poor teacher back."""
    found = advice({"small": [60.0, 64.0, 62.0], "large": [80.0, 84.0, 82.0]})
    assert found.take == "small"
    assert row_of(found, "large").told_worse
    assert row_of(found, "large").in_line
    told = " ".join(advice_sentences(found))
    assert "large, but it reads your text no better than small" in told
    assert "from their own losses on your text" in told


def test_neither_units_nor_order_change_the_advice():
    losses = {"small": [60.0, 64.0, 62.0], "large": [58.0, 62.0, 61.0]}
    plain = advice(losses)
    harder = advice({name: [3 * one for one in values] for name, values in losses.items()})
    turned = advice(losses, candidates=(LARGE, SMALL))
    kept = ("teacher_loss", "expected_loss", "difference")
    for other in (harder, turned):
        for mine, its in zip(plain.recommendations, other.recommendations, strict=True):
            assert its.teacher == mine.teacher
            for key in kept:
                assert getattr(its, key) == pytest.approx(getattr(mine, key))
    # the best has what the surface gives it, the other is as many per cent above
    expected = recommend(5 * BILLION, 100 * BILLION, [LARGE]).recommendations[0].teacher_loss
    assert row_of(plain, "large").teacher_loss == pytest.approx(expected)
    assert row_of(plain, "small").teacher_loss == pytest.approx(expected * 186 / 181)
    assert plain.surface.anchor == "large"


def test_of_two_as_large_the_better_is_taken():
    twin = replace(SMALL, name="twin")
    found = advice({"small": [62.0, 66.0], "twin": [61.0, 65.0]}, candidates=(SMALL, twin))
    assert found.take == "twin"
    assert "no better than twin, which is as large" in row_of(found, "small").cautions[0]
    assert row_of(found, "twin").cautions == ()


def test_tokens_that_are_not_known_matter_for_the_best_alone():
    unknown = [replace(one, tokens=None) for one in (SMALL, LARGE)]
    found = advice({"small": [60.0, 64.0], "large": [50.0, 54.0]}, candidates=unknown)
    assert "its training tokens are not known" in row_of(found, "large").cautions[0]
    assert row_of(found, "small").cautions == ()


def test_a_changed_text_is_a_caution():
    models = {"small": measured([60.0, 64.0], changed=1)}
    measurement = Measurement("text/", 1024, "stored", "cpu", models)
    found = recommend(BILLION, 20 * BILLION, [SMALL], measurement=measurement)
    assert "does not give back 1 of 2 documents" in found.recommendations[0].cautions[0]


# --- the command --------------------------------------------------------------------------------

ASKED = ("recommend", "--student", "8k", "--tokens", "1M")


def test_the_command_measures_and_ranks(typed, models, text_file, monkeypatch):
    teachers = ",".join(f"{name}={models[name]}" for name in ("bytes", "small", "large"))
    asked = (*ASKED, "--teachers", teachers, "--measure", text_file, "--measure-bytes", "3k")
    answer = typed(*asked, "--json")
    assert answer.code == 0, answer.err
    assert "measure: small:" in answer.err
    found = json.loads(answer.out)
    rows = {row["teacher"]: row for row in found["recommendations"]}
    assert found["measure"]["bytes"] == rows["small"]["measured"]["bytes"] <= 3000
    for row in rows.values():
        one = row["measured"]
        per_byte = one["nats_per_token"] * one["tokens"] / one["bytes"]
        assert one["nats_per_byte"] == pytest.approx(per_byte)
        assert one["overconfidence"] == pytest.approx(one["nats_per_token"] - one["entropy"])
    lowest = min(rows.values(), key=lambda row: row["measured"]["nats_per_byte"])
    assert lowest["measured"]["above_lowest"] == 0
    assert lowest["measured"]["above_lowest_stderr"] is None
    assert lowest["teacher"] == found["surface"]["anchor"]

    monkeypatch.setenv("COLUMNS", "50")
    printed = typed(*asked, "--quiet")
    assert (printed.code, printed.err) == (0, "")
    for name, row in rows.items():
        line = next(line for line in printed.out.splitlines() if line.startswith(f"{name} "))
        assert f" {row['expected_loss']:.3f} " in line
        assert f"{row['measured']['nats_per_byte']:.4f} ±" in printed.out
        assert f"{row['measured']['calibration_error']:.1%}" in printed.out
        for caution in row["cautions"]:
            assert caution in " ".join(printed.out.split())
    assert "…" not in printed.out


def test_without_measuring_nothing_is_claimed(typed):
    found = json.loads(typed(*ASKED, "--teachers", "20k,40k", "--json").out)
    assert found["measure"] is None
    assert [row["measured"] for row in found["recommendations"]] == [None, None]
    assert found["surface"]["anchor"] is None


def test_a_published_name_takes_the_weights_of_a_folder(models):
    with pytest.raises(UserError, match=r"non-embedding parameters, Pythia-14M"):
        candidates_of(None, [f"Pythia-14M={models['small']}"])
    from capgap.models.build import to_config
    from capgap.models.shape import Shape

    folder = Path(models["small"]).parent / "neox"
    to_config(Shape("gpt_neox", 128, 6, 4, 4, 32, 512, 50304, 2048, False)).save_pretrained(folder)
    (found,) = candidates_of(None, [f"Pythia-14M={folder}"])
    (published,) = candidates_of(None, ["Pythia-14M"])
    assert found == replace(published, source=str(folder))


@pytest.mark.parametrize(
    ("teachers", "told"),
    [
        ("20k", "of 20k there are no weights: give a folder"),
        ("Llama-2-7B", "as Llama-2-7B=FOLDER"),
        ("mine=", "'mine=' is not of the form NAME=FOLDER"),
        ("mine=./nowhere", "nowhere"),
        ("{small},again={small},small={large}", "the teacher small is given twice"),
        ("{hollow}", "holds no *.safetensors"),
        ("{misfit}", "has 100 tokens, its tokenizer 300"),
    ],
)
def test_candidates_that_cannot_be_measured(
    typed, models, text_file, small_corpus, tmp_path, teachers, told
):
    for name, words in (("hollow", 300), ("misfit", 100)):
        save_model(model_of(words=words), tmp_path / name, small_corpus.tokenizer)
    (tmp_path / "hollow/model.safetensors").unlink()
    places = {"hollow": tmp_path / "hollow", "misfit": tmp_path / "misfit"}
    answer = typed(
        *ASKED, "--teachers", teachers.format(**models, **places), "--measure", text_file
    )
    assert (answer.code, answer.err.count("\n"), answer.out) == (2, 1, "")
    assert told in answer.err


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("--measure", "./nowhere.txt"), "no such file or folder"),
        (("--measure", "stdlib", "--dtype", "int8"), "take one of stored, fp32, bf16"),
        (("--measure", "stdlib", "--device", "tpu9"), "is no device"),
        (("--measure", "stdlib", "--measure-bytes", "few"), "'few' is no count"),
        (("--dtype", "fp32"), "of use with --measure alone"),
    ],
)
def test_mistakes_of_measuring(typed, models, asked, told):
    answer = typed(*ASKED, "--teachers", models["small"], *asked)
    assert (answer.code, answer.err.count("\n"), answer.out) == (2, 1, "")
    assert told in answer.err


def test_losses_that_are_no_numbers_are_told(typed, models, text_file, tmp_path):
    from capgap.corpus.tokenizer import load_tokenizer
    from capgap.models.build import load_model

    broken = load_model(models["small"])
    torch.nn.init.constant_(broken.get_output_embeddings().weight, math.nan)
    save_model(broken, tmp_path / "broken", load_tokenizer(models["small"]))
    asked = ("--teachers", tmp_path / "broken", "--measure", text_file, "--measure-bytes", "500")
    answer = typed(*ASKED, *asked, "--quiet")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "broken: the losses are not finite with --dtype stored" in answer.err


def test_many_documents_are_a_smaller_error(models, tmp_path):
    (tmp_path / "text.txt").write_text(made_up_text(60, seed=3))
    errors = []
    for size in (8_000, 40_000):
        one = {"one": models["small"]}
        found = run_measure(str(tmp_path / "text.txt"), one, num_bytes=size)
        errors.append(found.models["one"].as_dict()["nats_per_byte_stderr"])
    assert errors[1] < errors[0]


# --- what a student makes of a teacher's text ---------------------------------------------------


def test_ranks_are_those_of_sorted_logits():
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 8), torch.randn(300, 8)
    targets = torch.randint(0, 300, (50,))
    logits = hidden @ weight.T
    expected = (logits > logits.gather(1, targets[:, None])).sum(1) + 1
    found = token_statistics(HeadInput(hidden, weight), targets)
    assert torch.equal(found.ranks, expected)


def test_the_student_reads_what_each_teacher_writes(typed, models, text_file):
    asked = (*ASKED, "--teachers", f"large={models['large']}", "--measure", text_file)
    asked = (*asked, "--measure-bytes", "3k", "--student-model", models["small"])
    answer = typed(*asked, "--json")
    assert answer.code == 0, answer.err
    [row] = json.loads(answer.out)["recommendations"]
    # a model that has learnt nothing gives ranks far above 100 to most tokens, at ln 300 nats each
    assert 5 < row["measured"]["rank_surprisal"] < 100 / 4
    shown = typed(*asked, "--quiet")
    assert "rank-surprisal" in shown.out
    assert "2601.14249" in shown.out
    alone = typed(*ASKED, "--teachers", "20k", "--student-model", models["small"])
    assert (alone.code, "--student-model are of use with --measure alone" in alone.err) == (2, True)
