"""The stage of a search: of a sweep's grid as much as its questions need."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from capgap.sizes import format_count
from capgap.stage import HOW, ShouldStop, text_table
from capgap.sweep.recipe import SearchSettings
from capgap.sweep.stages import Sweep

if TYPE_CHECKING:
    from capgap.sweep.progress import Display

# Keys of search.json that --json tells
TOLD = ("budget", "full_flops", "spent_flops", "spent_fraction", "stop", "choices")
STOP_REASONS = {
    "safe": "every choice is safe",
    "budget": "nothing more that is worth running fits into the budget",
    "exhausted": "there is nothing left to run",
}


class Search(Sweep, SearchSettings):
    """Find every student's best teacher for a share of what the whole grid would cost."""

    folder_ending: ClassVar[str] = "-search"

    out: Annotated[Path | None, HOW, "Output folder; runs/NAME-search if none is given."] = None

    def _expected(self) -> dict[str, Any]:
        from capgap.sweep.search import GridSearch

        return GridSearch(self.loaded, self).expected()

    def _run(self, display: "Display", should_stop: ShouldStop) -> dict[str, Any]:
        from capgap.sweep.runner import run_folder
        from capgap.sweep.search import GridSearch

        search = GridSearch(self.loaded, self)
        found = run_folder(
            search.plan, self.folder, display, search.run, should_stop, on=self.where
        )
        trace = search.trace()
        return found | {"search": {name: trace[name] for name in TOLD}}

    def told(self, found: dict[str, Any]) -> str:
        if not self.dry_run:
            return f"{self._told_choices(found['search'])}\n\n{super().told(found)}"
        rungs = ", ".join(format_count(tokens) for tokens in found["rungs"])
        lines = [
            f"{found['name']}: the full grid has {found['cells']} cells and takes "
            f"{found['full_flops']:.3g} FLOPs without baselines",
            f"a budget of {found['budget']:.1%} allows {found['budget_flops']:.3g}, on rungs of "
            f"{rungs} tokens",
            f"it begins with {len(found['first'])} runs for {found['first_flops']:.3g} FLOPs:",
            *(f"  {name}" for name in found["first"]),
        ]
        return "\n".join(lines)

    def _told_choices(self, found: dict[str, Any]) -> str:
        """The choices, what was spent, why the search stopped."""

        def number(one: dict[str, Any], name: str, form: str = ".4f") -> str:
            return "-" if one[name] is None else format(one[name], form)

        names = ("student", "teacher", "T/S", "expected loss", "±", "regret", "safe", "runs")
        rows = [
            (
                format_count(one["student_size"]),
                format_count(one["teacher_size"]),
                f"{one['ratio']:.2f}",
                number(one, "loss"),
                number(one, "loss_stderr"),
                number(one, "expected_regret"),
                number(one, "safe_probability", ".0%"),
                str(one["full_runs"]),
            )
            for one in found["choices"]
        ]
        return (
            f"The best teacher of every student\n{text_table(names, rows)}\n"
            f"losses in nats per token at {format_count(self.loaded.students.tokens[0])} tokens; "
            "regret: what choosing it instead of the true best is expected to cost; safe: the "
            f"probability that no teacher is better by more than {self.tolerance:.2%} of the "
            "loss; runs: of that cell at full tokens\n"
            f"spent {found['spent_fraction']:.1%} of the full grid's {found['full_flops']:.3g} "
            f"FLOPs (budget {found['budget']:.1%}); stopped because {STOP_REASONS[found['stop']]}"
        )
