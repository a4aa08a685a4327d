"""The evidence for what a cache keeps: a student's held-out loss against online distillation.

    python benchmarks/cache.py --source TEXT --out runs/cache

One teacher is trained, then the same student is distilled from it online and from caches that keep
different numbers of words, and by labels alone. What is finished is kept in results.jsonl; the
table printed at the end is the one in docs/results/cache.md.
"""

import argparse
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

VOCABULARY = 4096
WINDOW = 128
BATCH_WINDOWS = 8
TEACHER, TEACHER_TOKENS = 1_000_000, 4_000_000
STUDENT, STUDENT_TOKENS = 250_000, 2_000_000
CORPUS_BYTES = 8_000_000
SEEDS = (0, 1)
ALPHAS = (1.0, 0.5)
# (top_k, samples); no words at all stand for the teacher itself
KEPT = ((4, 0), (12, 0), (28, 0), (54, 0), (0, 16), (0, 54), (4, 8), (12, 16), (25, 29))


def make_teacher(folder: Path) -> Path:
    import torch

    from capgap.corpus.text import Text
    from capgap.models.build import build_model, save_model
    from capgap.models.shape import ladder_shape
    from capgap.train.learner import Learner
    from capgap.train.learning_rate import auto_learning_rate
    from capgap.train.loop import LoopSettings, train

    path = folder / "teacher"
    if path.exists():
        return path
    torch.set_num_threads(2)
    corpus = Text.open([(folder / "corpus", None)], WINDOW)
    shape = ladder_shape("llama", TEACHER, vocabulary=VOCABULARY, positions=WINDOW)
    model = build_model(shape, seed=1)
    steps = TEACHER_TOKENS // (BATCH_WINDOWS * WINDOW)
    learner = Learner("teacher", model, steps, auto_learning_rate(TEACHER))
    settings = LoopSettings(BATCH_WINDOWS, BATCH_WINDOWS, data_seed=9)
    train([learner], corpus, settings, checkpoint_folder=folder / "checkpoints")
    save_model(model, path, corpus.tokenizer)
    return path


def make_cache(folder: str, top_k: int, samples: int) -> None:
    import torch

    from capgap.corpus.text import Text
    from capgap.distill.cache import CacheFormat, CacheIdentity, CacheWriter, write_cache
    from capgap.distill.teacher import OnlineTeacher
    from capgap.models.build import load_model
    from capgap.models.identity import model_hash

    torch.set_num_threads(1)
    teacher = Path(folder) / "teacher"
    corpus = Text.open([(Path(folder) / "corpus", None)], WINDOW)
    identity = CacheIdentity.of(
        "teacher", model_hash(teacher), "float32", corpus, document_mask=False
    )
    writer = CacheWriter(
        Path(folder) / f"cache-{top_k}-{samples}",
        identity,
        CacheFormat(corpus.vocabulary, top_k, samples),
    )
    write_cache(writer, OnlineTeacher(load_model(teacher)), corpus, device=torch.device("cpu"))


def distill(folder: str, kept: tuple[int, int] | None, alpha: float, seed: int) -> dict[str, Any]:
    """kept None: the teacher itself; alpha 0: no teacher at all."""
    import torch

    from capgap.corpus.text import Text
    from capgap.distill.cache import CachedTeacher
    from capgap.distill.teacher import OnlineTeacher, TeacherSource
    from capgap.evaluate.losses import evaluate_heldout, heldout_set
    from capgap.models.build import build_model, load_model
    from capgap.models.parts import Parts
    from capgap.models.shape import ladder_shape
    from capgap.train.learner import Learner
    from capgap.train.learning_rate import auto_learning_rate
    from capgap.train.loop import LoopSettings, train

    torch.set_num_threads(1)
    corpus = Text.open([(Path(folder) / "corpus", None)], WINDOW)
    teacher: TeacherSource | None = None
    token_bytes = None
    if kept is not None:
        teacher = CachedTeacher(Path(folder) / f"cache-{kept[0]}-{kept[1]}", corpus)
        token_bytes = teacher.format.token_bytes
    elif alpha > 0:
        teacher = OnlineTeacher(load_model(Path(folder) / "teacher"))
    shape = ladder_shape("llama", STUDENT, vocabulary=VOCABULARY, positions=WINDOW)
    model = build_model(shape, seed=seed)
    steps = STUDENT_TOKENS // (BATCH_WINDOWS * WINDOW)
    learner = Learner("student", model, steps, auto_learning_rate(STUDENT), alpha)
    start = time.process_time()
    settings = LoopSettings(BATCH_WINDOWS, BATCH_WINDOWS, data_seed=seed)
    train([learner], corpus, settings, teacher=teacher)
    found = evaluate_heldout(
        Parts(model), heldout_set(corpus.heldout_documents(), corpus.marks, WINDOW)
    )
    return {
        "kept": kept,
        "alpha": alpha,
        "seed": seed,
        "token_bytes": token_bytes,
        "loss": found.loss,
        "cpu_seconds": time.process_time() - start,
    }


def print_table(results: list[dict[str, Any]]) -> None:
    def losses(kept: Any, alpha: float) -> dict[int, float]:
        return {
            run["seed"]: run["loss"]
            for run in results
            if run["kept"] == kept and run["alpha"] == alpha
        }

    print("| alpha | top-k | samples | bytes a token | held-out loss | against online |")
    print("|---|---|---|---|---|---|")
    for alpha in ALPHAS:
        online = losses(None, alpha)
        sizes = {tuple(run["kept"]): run["token_bytes"] for run in results if run["kept"]}
        rows: list[tuple[str, str, Any, dict[int, float]]] = [
            ("labels alone", "", "", losses(None, 0.0)),
            ("online", "", "", online),
        ]
        rows += [(str(k), str(n), sizes.get((k, n)), losses([k, n], alpha)) for k, n in KEPT]
        for top_k, samples, size, found in rows:
            shared = sorted(found.keys() & online.keys())
            if not shared:
                continue
            changes = [found[seed] / online[seed] - 1 for seed in shared]
            told = ", ".join(f"{change:+.2%}" for change in changes)
            mean = statistics.mean(found[seed] for seed in shared)
            print(f"| {alpha:g} | {top_k} | {samples} | {size} | {mean:.4f} | {told} |")


def main() -> None:
    from capgap.corpus.prepare import prepare_corpus

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", default="stdlib")
    parser.add_argument("--heldout-source")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    folder = arguments.out
    prepare_corpus(
        arguments.source,
        folder / "corpus",
        vocabulary=VOCABULARY,
        max_bytes=CORPUS_BYTES,
        heldout_source=arguments.heldout_source,
    )
    make_teacher(folder)
    path = folder / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    runs = [(None, 0.0)] + [(kept, alpha) for alpha in ALPHAS for kept in (None, *KEPT)]
    done = {(str(run["kept"]), run["alpha"], run["seed"]) for run in results}
    with ProcessPoolExecutor(arguments.workers) as pool, path.open("a") as log:
        for made in [pool.submit(make_cache, str(folder), *kept) for kept in KEPT]:
            made.result()
        waiting = [
            pool.submit(distill, str(folder), kept, alpha, seed)
            for seed in SEEDS
            for kept, alpha in runs
            if (str(None if kept is None else list(kept)), alpha, seed) not in done
        ]
        for future in as_completed(waiting):
            results.append(future.result())
            log.write(json.dumps(results[-1]) + "\n")
            log.flush()
    print_table([json.loads(line) for line in path.read_text().splitlines()])


if __name__ == "__main__":
    main()
