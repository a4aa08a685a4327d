"""What every process of a sweep knows: the recipe, the output folder and where things lie in it."""

from dataclasses import dataclass
from pathlib import Path

from capgap.machine import usable_cores
from capgap.sweep.recipe import Recipe
from capgap.train.recipe import TrainingSection

SEARCH_FILE = "search.json"


@dataclass(frozen=True)
class Context:
    """Paths are functions of ids, so that a restart finds what is there. `training`: the recipe's,
    with the precision that the sweep began with."""

    recipe: Recipe
    out: Path
    device: str
    threads: int | None
    training: TrainingSection

    @property
    def corpus_folder(self) -> Path:
        return self.out / "corpus"

    def record_folder(self, run_id: str) -> Path:
        return self.out / "records" / run_id

    def teacher_folder(self, teacher_id: str) -> Path:
        return self.out / "teachers" / teacher_id

    def importance_file(self, teacher_id: str) -> Path:
        return self.out / "work" / "importance" / f"{teacher_id}.safetensors"

    def student_folder(self, cell_id: str) -> Path:
        return self.out / "work" / "students" / cell_id

    def assistant_folder(self, assistant_id: str) -> Path:
        return self.out / "work" / "assistants" / assistant_id

    def assistant_outcome(self, assistant_id: str) -> Path:
        return self.out / "work" / "assistants" / f"{assistant_id}.json"

    def checkpoint_folder(self, task_id: str) -> Path:
        return self.out / "work" / "checkpoints" / task_id

    def is_recorded(self, run_id: str) -> bool:
        return (self.record_folder(run_id) / "record.json").exists()


def resolve_workers(asked: int | str, device: str, *, most: int) -> tuple[int, int | None]:
    """(worker processes, torch threads of each); `most` tasks can run at once.

    Small models gain more from one thread a process on every core than from many threads in one.
    A GPU is given to a single worker.
    """
    if device != "cpu":
        return (1 if asked == "auto" else min(most, int(asked))), None
    cores = usable_cores()
    workers = min(most, cores if asked == "auto" else int(asked))
    return workers, max(1, cores // workers)
