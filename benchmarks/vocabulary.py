"""The evidence for the default vocabulary: bits per byte from the same text, and what it costs.

    python benchmarks/vocabulary.py --out runs/vocabulary

Each model reads the same number of bytes; a larger vocabulary makes fewer tokens of them but a
larger head. The table printed at the end is the one in docs/results/vocabulary.md.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

VOCABULARIES = (512, 1024, 2048, 4096)
SIZES = (50_000, 200_000)
TRAINED_BYTES = 3_000_000
WINDOW_BYTES = 320  # the same context in bytes for every vocabulary
BATCH_WINDOWS = 8


def measure(size: int, vocabulary: int, folder: str) -> dict[str, Any]:
    import torch

    from capgap.corpus.text import Text
    from capgap.evaluate.losses import evaluate_heldout, heldout_set
    from capgap.models.build import build_model
    from capgap.models.parts import Parts
    from capgap.models.shape import ladder_shape
    from capgap.sizes import training_flops
    from capgap.train.learner import Learner
    from capgap.train.learning_rate import auto_learning_rate
    from capgap.train.loop import LoopSettings, train

    torch.set_num_threads(1)
    path = Path(folder) / f"corpus-{vocabulary}"
    manifest = json.loads((path / "manifest.json").read_text())
    bytes_a_token = manifest["train"]["bytes"] / manifest["train"]["tokens"]
    window = round(WINDOW_BYTES / bytes_a_token / 8) * 8
    corpus = Text.open([(path, None)], window)
    shape = ladder_shape("llama", size, vocabulary=vocabulary, positions=window)
    model = build_model(shape, seed=0)
    steps = round(TRAINED_BYTES / bytes_a_token / (BATCH_WINDOWS * window))
    learner = Learner("model", model, steps, auto_learning_rate(size))
    start = time.process_time()
    train([learner], corpus, LoopSettings(BATCH_WINDOWS, BATCH_WINDOWS, data_seed=0))
    seconds = time.process_time() - start
    found = evaluate_heldout(
        Parts(model), heldout_set(corpus.heldout_documents(), corpus.marks, window)
    )
    tokens = steps * BATCH_WINDOWS * window
    return {
        "size": size,
        "vocabulary": vocabulary,
        "bytes_a_token": bytes_a_token,
        "tokens": tokens,
        "flops": training_flops(shape.parameters().total, tokens),
        "cpu_seconds": seconds,
        "bits_per_byte": found.bits_per_byte,
        "stderr": found.as_dict()["bits_per_byte_stderr"],
    }


def main() -> None:
    from capgap.corpus.prepare import prepare_corpus

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", default="stdlib")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    for vocabulary in VOCABULARIES:
        prepare_corpus(
            arguments.source, arguments.out / f"corpus-{vocabulary}", vocabulary=vocabulary
        )
    path = arguments.out / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(run["size"], run["vocabulary"]) for run in results}
    with ProcessPoolExecutor(arguments.workers) as pool, path.open("a") as log:
        waiting = [
            pool.submit(measure, size, vocabulary, str(arguments.out))
            for size in SIZES
            for vocabulary in VOCABULARIES
            if (size, vocabulary) not in done
        ]
        for future in as_completed(waiting):
            results.append(future.result())
            log.write(json.dumps(results[-1]) + "\n")
            log.flush()
    print("| model | vocabulary | bytes a token | tokens | FLOPs | CPU seconds | bits per byte |")
    print("|---|---|---|---|---|---|---|")
    for run in sorted(results, key=lambda run: (run["size"], run["vocabulary"])):
        print(
            f"| {run['size'] // 1000}k | {run['vocabulary']} | {run['bytes_a_token']:.2f} | "
            f"{run['tokens']:,} | {run['flops']:.2e} | {run['cpu_seconds']:.0f} | "
            f"{run['bits_per_byte']:.3f} ± {run['stderr']:.3f} |"
        )


if __name__ == "__main__":
    main()
