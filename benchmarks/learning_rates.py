"""The evidence for the learning-rate rule: held-out loss over rates and sizes.

    python benchmarks/learning_rates.py --out runs/learning-rates

Every run is one line of results.jsonl; a restart skips what is there. The table printed at the end
is the one in docs/results/learning-rates.md.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)
SIZES = {
    "llama": (30_000, 100_000, 260_000, 640_000),
    "gpt_neox": (100_000,),
    "gpt2": (100_000,),
}
TOKENS = 1_000_000
WINDOW = 128
VOCABULARY = 1024
# students cut out of a trained teacher, trained on fewer tokens
CUT_FROM = 260_000
CUT_SIZES = (30_000, 80_000)
CUT_TOKENS = 400_000


def runs(batch_tokens: int) -> list[dict[str, Any]]:
    found = []
    for architecture, sizes in SIZES.items():
        for size in sizes:
            for rate in RATES:
                if size > 500_000 and rate > 2e-2:
                    continue  # far from the best of the smaller sizes
                found.append(
                    {"architecture": architecture, "size": size, "rate": rate, "init": "scratch"}
                )
    for size in CUT_SIZES:
        for rate in (2e-3, *RATES):
            found.append({"architecture": "llama", "size": size, "rate": rate, "init": "pruned"})
    return [run | {"batch_tokens": batch_tokens} for run in found]


def measure(run: dict[str, Any], folder: str) -> dict[str, Any]:
    import torch

    from capgap.corpus.text import Text
    from capgap.evaluate.losses import evaluate_heldout, heldout_set
    from capgap.models.build import build_model, load_model
    from capgap.models.parts import Parts
    from capgap.models.shape import ladder_shape
    from capgap.prune.surgery import prune
    from capgap.train.learner import Learner
    from capgap.train.loop import LoopSettings, train

    torch.set_num_threads(1)
    corpus = Text.open([(Path(folder) / "corpus", None)], WINDOW)
    if run["init"] == "pruned":
        batches = torch.from_numpy(corpus.train.windows_at(range(256))).split(8)
        model = prune(load_model(Path(folder) / "teacher"), batches, run["size"])
        tokens = CUT_TOKENS
    else:
        shape = ladder_shape(
            run["architecture"], run["size"], vocabulary=corpus.vocabulary, positions=WINDOW
        )
        model, tokens = build_model(shape, seed=0), TOKENS
    windows = run["batch_tokens"] // WINDOW
    learner = Learner("model", model, tokens // run["batch_tokens"], run["rate"])
    train([learner], corpus, LoopSettings(windows, windows, data_seed=0))
    found = evaluate_heldout(
        Parts(model), heldout_set(corpus.heldout_documents(), corpus.marks, WINDOW)
    )
    return run | {"loss": found.loss, "stderr": found.loss_stderr, "failure": learner.failure}


def train_teacher(folder: Path) -> None:
    """The model that students are cut out of."""
    import torch

    from capgap.corpus.text import Text
    from capgap.models.build import build_model, save_model
    from capgap.models.shape import ladder_shape
    from capgap.train.learner import Learner
    from capgap.train.loop import LoopSettings, train

    corpus = Text.open([(folder / "corpus", None)], WINDOW)
    shape = ladder_shape("llama", CUT_FROM, vocabulary=corpus.vocabulary, positions=WINDOW)
    model = build_model(shape, seed=0)
    torch.set_num_threads(1)
    train([Learner("teacher", model, TOKENS // 1024, 6e-3)], corpus, LoopSettings(8, 8, 1))
    save_model(model, folder / "teacher")


def table(results: list[dict[str, Any]]) -> str:
    rates = sorted({run["rate"] for run in results})
    lines = ["| model | " + " | ".join(f"{rate:g}" for rate in rates) + " |"]
    lines.append("|---" * (len(rates) + 1) + "|")
    rows: dict[tuple[str, str, int], dict[float, float]] = {}
    for run in results:
        key = (run["init"], run["architecture"], run["size"])
        rows.setdefault(key, {})[run["rate"]] = run["loss"]
    for (init, architecture, size), losses in sorted(rows.items()):
        cells = []
        for rate in rates:
            loss = losses.get(rate)
            text = "" if loss is None else f"{loss:.3f}"
            cells.append(f"**{text}**" if loss == min(losses.values()) else text)
        lines.append(f"| {architecture} {size // 1000}k {init} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    from capgap.corpus.prepare import prepare_corpus

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", default="stdlib")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    prepare_corpus(arguments.source, arguments.out / "corpus", vocabulary=VOCABULARY)
    path = arguments.out / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(run["architecture"], run["size"], run["rate"], run["init"]) for run in results}
    if not (arguments.out / "teacher").exists():
        train_teacher(arguments.out)
    with ProcessPoolExecutor(arguments.workers) as pool, path.open("a") as log:
        waiting = [
            pool.submit(measure, run, str(arguments.out))
            for run in runs(arguments.batch_tokens)
            if (run["architecture"], run["size"], run["rate"], run["init"]) not in done
        ]
        for future in as_completed(waiting):
            results.append(future.result())
            log.write(json.dumps(results[-1]) + "\n")
            log.flush()
    print(table(results))


if __name__ == "__main__":
    main()
