"""Is the quickstart's answer the same with every seed, in time and memory?

    python benchmarks/quickstart.py --seeds 10 --out runs/seeds

Every seed is a sweep of its own in OUT; the same command goes on with what OUT/seeds.json lacks and
prints it as a table: which teachers the answer leaves out with few and with many tokens, the
contrast of tokens, minutes and memory.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from capgap.config import find_recipe, load_recipe
from capgap.law.law import read_law
from capgap.report.sentences import main_curves, sentences
from capgap.sizes import clock_time, format_count
from capgap.sweep.recipe import Recipe
from capgap.sweep.stages import Quickstart


def recipe_of(seed: int) -> Recipe:
    return load_recipe(find_recipe("quickstart"), [f"seeds=[{seed}]"])


def one_seed(seed: int, out: Path) -> dict[str, Any]:
    recipe = recipe_of(seed)
    result = Quickstart(out=out, set=[f"seeds=[{seed}]"]).run()
    law = read_law(out / "law.json")
    curves = main_curves(law.curves)
    left_out = {}
    for tokens in sorted({curve.tokens for curve in curves}):
        own = [curve for curve in curves if curve.tokens == tokens]
        worse = [{p.teacher_size for p in curve.points if p.worse} for curve in own]
        left_out[tokens] = sorted(set.union(*worse))
    init = curves[0].init
    contrasts = [c for c in law.contrasts if c.what == "tokens" and c.inits[0] == init]
    slope = contrasts[0].per_log_tokens if contrasts else None
    return {
        "seed": seed,
        "recipe_hash": recipe.hash(),
        "headline": sentences(law)[0],
        "left_out": left_out,
        "per_log_tokens": None if slope is None else slope.model_dump(),
        "minutes": result["wall_seconds"] / 60,
        "memory_gb": result["peak_memory_bytes"] / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, choices=range(1, 101), metavar="N")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    kept = asked.out / "seeds.json"
    rows = json.loads(kept.read_text()) if kept.is_file() else []
    # those of another recipe are no rows of this table
    rows = [row for row in rows if row.get("recipe_hash") == recipe_of(row["seed"]).hash()]
    for seed in sorted(set(range(asked.seeds)) - {row["seed"] for row in rows}):
        rows.append(one_seed(seed, asked.out / f"seed{seed}"))
        kept.write_text(json.dumps(rows, indent=1) + "\n")
    # keys as text, also of what was just made
    rows = sorted(json.loads(kept.read_text()), key=lambda row: row["seed"])
    budgets = list(rows[0]["left_out"])
    told = " | ".join(f"left out with {format_count(int(tokens))} tokens" for tokens in budgets)
    print(f"| seed | {told} | slope per ln of tokens | time | memory |")
    print("|---" * (len(budgets) + 4) + "|")
    for row in rows:
        sets = [", ".join(map(format_count, row["left_out"][t])) or "none" for t in budgets]
        slope = row["per_log_tokens"]
        span = "" if slope is None else "{value:.3f} ({low:.3f} to {high:.3f})".format(**slope)
        print(
            f"| {row['seed']} | {' | '.join(sets)} | {span} | "
            f"{clock_time(60 * row['minutes'])} | {row['memory_gb']:.1f} GB |"
        )


if __name__ == "__main__":
    main()
