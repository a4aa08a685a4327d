"""What a score of units is worth on models that others made: by axis, seed, sample, and distilled.

    python benchmarks/scores.py MODEL --source TEXT --heldout TEXT --out runs/scores.jsonl

MODEL is a folder of one of the families. One axis at a time is cut to about 70% (heads, FFN, hidden
width, layers), and then all three widths together; of these the students are also distilled.
Every finished measurement is a line of the file; the same command goes on with what is missing.
`--table FILE` prints the tables of docs/results/pruning.md.
"""

import argparse
import functools
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from capgap.corpus.prepare import prepare_corpus
from capgap.corpus.text import Text
from capgap.distill.teacher import OnlineTeacher
from capgap.evaluate.losses import HeldoutSet, evaluate_heldout, heldout_set
from capgap.models.build import load_model, shape_of
from capgap.models.parts import Parts
from capgap.models.shape import Shape
from capgap.prune.importance import Importance, score, scoring_batches
from capgap.prune.surgery import cut
from capgap.train.learner import Learner
from capgap.train.learning_rate import auto_learning_rate
from capgap.train.loop import LoopSettings, train

METHODS = ("weights", "first_order", "activation", "norm", "random")
DEPTHS = {"weights": None, "first_order": None, "influence": "influence", "ends": "ends"}
SAMPLES = (4096, 16384)
SEEDS = (0, 1)
WINDOW = 256
KEEP = 0.7
BATCH_WINDOWS = 4


def shapes(own: Shape) -> dict[str, Shape]:
    """The teacher with one axis cut, and with all widths cut."""
    group = own.heads // own.kv_heads
    fitting = [one for one in range(1, own.kv_heads + 1) if own.hidden % (one * group) == 0]
    kv_heads = max(one for one in fitting if one <= max(1, round(KEEP * own.kv_heads)))
    step = kv_heads * group * 4
    sizes: dict[str, dict[str, int]] = {
        "heads": {"heads": kv_heads * group, "kv_heads": kv_heads},
        "ffn": {"ffn": round(KEEP * own.ffn / 8) * 8},
        "hidden": {"hidden": round(KEEP * own.hidden / own.heads) * own.heads},
        "layers": {"layers": round(KEEP * own.layers)},
    }
    every = sizes["heads"] | sizes["ffn"] | {"hidden": round(KEEP * own.hidden / step) * step}
    found = {name: replace(own, **changes) for name, changes in sizes.items()}
    return found | {"all widths": replace(own, **every)}


def work(*, tokens: int) -> Iterator[dict[str, Any]]:
    """What is measured, the cheapest and most telling first."""
    for sample, seed in itertools.product(SAMPLES, SEEDS):
        told = {"sample": sample, "seed": seed}
        for method in METHODS:
            for axis in ("heads", "ffn", "hidden", "all widths"):
                yield {"axis": axis, "method": method, **told, "tokens": 0}
            if method in DEPTHS:
                yield {"axis": "layers", "method": method, **told, "tokens": 0}
            if sample == SAMPLES[0] and tokens and method != "random":
                yield {"axis": "all widths", "method": method, **told, "tokens": tokens}
        for name in ("influence", "ends"):
            yield {"axis": "layers", "method": name, **told, "tokens": 0}


def scorer(model: PreTrainedModel, corpus: Text) -> Callable[..., Importance]:
    """Scores of one method, sample and seed, kept until others are asked for."""

    @functools.lru_cache(maxsize=1)
    def scores(name: Any, sample: int, seed: int) -> Importance:
        batches = scoring_batches(corpus, sample, batch_windows=4, seed=seed)
        method = {"influence": "activation", "ends": "random"}.get(name, name)
        depth = DEPTHS.get(name, "ends")
        return score(model, batches, method=method, depth=depth, seed=seed)

    return scores


def measure(
    asked: dict[str, Any],
    model: PreTrainedModel,
    corpus: Text,
    heldout: HeldoutSet,
    scores: Callable[..., Importance],
) -> dict[str, Any]:
    """Held-out loss of one student in nats a token, as it is cut and distilled."""
    shape = shapes(shape_of(model.config))[asked["axis"]]
    student = cut(model, scores(asked["method"], asked["sample"], asked["seed"]), shape)
    found = {"after_cut": evaluate_heldout(Parts(student), heldout).loss, "distilled": None}
    if asked["tokens"]:
        counts = shape.parameters()
        rate = auto_learning_rate(counts.non_embedding, is_cut=True)
        steps = asked["tokens"] // (BATCH_WINDOWS * WINDOW)
        learner = Learner("student", student, steps, rate, 0.5)
        with tempfile.TemporaryDirectory() as work_folder:
            train(
                [learner],
                corpus,
                LoopSettings(BATCH_WINDOWS, 1, data_seed=asked["seed"]),
                teacher=OnlineTeacher(model),
                checkpoint_folder=Path(work_folder) / "checkpoints",
            )
        found["distilled"] = evaluate_heldout(Parts(learner.model), heldout).loss
    return {**asked, "parameters": shape.parameters().total, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--source")
    parser.add_argument("--heldout")
    parser.add_argument(
        "--documents", type=int, default=12, help="held-out documents that are read"
    )
    parser.add_argument("--tokens", type=int, default=15_360, help="to distil on; 0 for none")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table([json.loads(line) for line in arguments.table.read_text().splitlines()]))
        return
    done = []
    if arguments.out.exists():
        done = [json.loads(line) for line in arguments.out.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare_corpus(
            arguments.source,
            Path(folder) / "corpus",
            heldout_source=arguments.heldout,
            heldout_tokens=arguments.documents * 400,
            tokenizer=arguments.model,
            window=WINDOW,
        )
        corpus = Text.of([prepared])
        heldout = heldout_set(corpus.heldout_documents(), corpus.marks, WINDOW, corpus.vocabulary)
        model = load_model(arguments.model, torch.float32)
        scores = scorer(model, corpus)
        for asked in work(tokens=arguments.tokens):
            known = {"model": Path(arguments.model).name, **asked}
            if any(known.items() <= one.items() for one in done):
                continue
            found = {**known, **measure(asked, model, corpus, heldout, scores)}
            with arguments.out.open("a") as stream:
                stream.write(json.dumps(found) + "\n")
            print(found, flush=True)


def table(results: list[dict[str, Any]]) -> str:
    """Means over seeds, by model, axis and sample; the lowest of every row in bold."""
    lines = []
    for what in ("after_cut", "distilled"):
        for axes, names in (
            (("heads", "ffn", "hidden", "all widths"), METHODS),
            (("layers",), tuple(DEPTHS)),
        ):
            lines += ["", f"| {what.replace('_', ' ')} | " + " | ".join(names) + " |"]
            lines.append("|---" * (len(names) + 1) + "|")
            rows = sorted({(one["model"], one["axis"], one["sample"]) for one in results})
            for model, axis, sample in rows:
                means = {}
                for name in names:
                    losses = [
                        one[what]
                        for one in results
                        if (one["model"], one["axis"], one["sample"], one["method"])
                        == (model, axis, sample, name)
                        and one[what] is not None
                        and (what == "distilled" or not one["tokens"])
                    ]
                    if losses and axis in axes:
                        means[name] = statistics.fmean(losses)
                if not means:
                    continue
                best = min(means.values())
                cells = [
                    ""
                    if name not in means
                    else f"**{means[name]:.3f}**"
                    if means[name] == best
                    else f"{means[name]:.3f}"
                    for name in names
                ]
                lines.append(f"| {model}, {axis}, {sample:,} tokens | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
