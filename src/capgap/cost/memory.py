"""How much memory a training loop needs at its peak, by part. Imports no torch.

It follows `capgap.train.loop` through a step. Weights are fp32, AdamW keeps two more numbers of
each, gradients are fp32; with several micro-batches they stay from one to the next. What is needed
beside them differs from phase to phase, and the largest phase is the peak:

    teacher_forward   the teacher's layer at work; no gradient, so nothing of it stays
    loss              activations, hidden states, the gradients of hidden states and heads, a chunk
    backward          the same gradients; of a layer that is at work gradients of its activations,
                      and with checkpointing its activations, computed again
    first_layer       the backward pass at its last layer: all gradients but those of the tables
    tables            all gradients; of a table that is the head as well, both beside their sum
"""

from dataclasses import dataclass

from capgap.cost.activations import (
    FLOAT,
    HALF,
    backward_transient,
    forward_transient,
    kept_bytes,
    layer_bytes,
)
from capgap.distill import block_rows, chunk_rows, padded_rows
from capgap.machine import GPUS
from capgap.models.shape import Shape
from capgap.train.recipe import FILE_BYTES, RunSection, TrainingSection

PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "loss_chunks",
    "teacher",
    "gathered",
    "checkpoint",
)
# Blocks of numbers beside the student's logits and probabilities, by divergence: measured; a
# temperature and a cap add one each
TEMPORARIES = {
    "forward_kl": 1,
    "reverse_kl": 5,
    "total_variation": 5,
    "jsd": 8,
    "skewed_kl": 8,
}
# Of FSDP whole at once: weights of a layer and of the next, gradients of a layer, and the copy of
# them that is sent
GATHERED_LAYERS = 4


@dataclass(frozen=True)
class LoopMemory:
    """What one process of a loop holds: the students of a teacher, or of none.

    micro_batch_tokens: of one process; micro_batches: of one step of it. teacher_bytes: of one of
    its weights, 2 or 4. device: the type, `cpu` or `cuda`. ranks: processes that shard models.
    teacher_place: `device`, `host` where its layers are offloaded, or `elsewhere`. checkpoints:
    whether it saves any, whose copies lie in the host's memory while they are written.
    """

    students: tuple[Shape, ...]
    teacher: Shape | None
    window: int
    micro_batch_tokens: int
    micro_batches: int = 1
    autocast: bool = False
    teacher_bytes: int = FLOAT
    activation_checkpointing: bool = False
    document_mask: bool = False
    divergence: str = "forward_kl"
    temperature: float = 1.0
    device: str = "cpu"
    ranks: int = 1
    teacher_place: str = "device"
    checkpoints: bool = False

    def phases(self) -> dict[str, dict[str, int]]:
        """Bytes by part (`PARTS`) of every phase."""
        first, last = self.students[0], self.students[-1]
        # before the first micro-batch of a step there are no gradients
        held = 0 if self.micro_batches == 1 else self._weights
        # of the first student's token table they come last
        late = 0 if held else FLOAT * first.parameters().embedding // self.ranks
        states = self._hidden_bytes(self.teacher, self.teacher_bytes) if self.teacher else 0
        kept = sum(
            kept_bytes(one, *self._tokens, **self._how, checkpointed=self.activation_checkpointing)
            for one in self.students
        )
        hidden = sum(self._hidden_bytes(one, FLOAT) for one in self.students)
        heads = sum(self._head_gradients(one) for one in self.students)
        # beside the sum of a tied table's two gradients those themselves; of several ranks every
        # one has them whole
        tables = 2 if first.tied or self.ranks > 1 else 0
        found = {
            "loss": self._parts(
                gradients=held,
                activations=kept + hidden,
                loss_chunks=self._chunks + heads,
                teacher=self._teacher_weights + states,
            ),
            "backward": self._parts(
                gradients=held, activations=kept + self._at_work(last), loss_chunks=heads
            ),
            "first_layer": self._parts(
                gradients=self._weights - late,
                activations=self._at_work(first),
                loss_chunks=self._head_gradients(first),
            ),
            "tables": self._parts(
                gradients=self._weights,
                loss_chunks=tables * FLOAT * first.vocabulary * first.hidden,
            ),
        }
        if self.teacher is not None:
            work = forward_transient(self.teacher, self.window, self.teacher_bytes)
            found["teacher_forward"] = self._parts(
                gradients=held,
                teacher=self._teacher_weights + states + self.micro_batch_tokens * work,
            )
        return found

    def peak(self) -> tuple[str, dict[str, int]]:
        """The largest phase, and its bytes by part."""
        return max(self.phases().items(), key=lambda phase: sum(phase[1].values()))

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.peak()[1].values())

    def at_most(self) -> dict[str, int]:
        """Bytes of every part in the phase where it is largest."""
        found = self.phases().values()
        return {part: max(phase[part] for phase in found) for part in PARTS}

    def in_host(self) -> int:
        """Bytes that a process with a GPU has in the host's memory."""
        offloaded = 0
        if self.teacher is not None and self.teacher_place == "host":
            offloaded = self.teacher_bytes * _layer(self.teacher) * self.teacher.layers
        return offloaded + self._checkpoint

    def _parts(self, **parts: int) -> dict[str, int]:
        """Those that are always there, and these."""
        held = {
            "weights": self._weights,
            "optimizer": 2 * self._weights,
            "teacher": self._teacher_weights,
            "gathered": self._gathered,
            "checkpoint": self._checkpoint if self.device == "cpu" else 0,
        }
        return dict.fromkeys(PARTS, 0) | held | parts

    @property
    def _checkpoint(self) -> int:
        """The copy of weights and moments that is being written, and of its file."""
        copied = 3 * self._weights
        return copied + 2 * min(copied, FILE_BYTES) if self.checkpoints else 0

    @property
    def _weights(self) -> int:
        total = sum(one.parameters().total for one in self.students)
        return FLOAT * total // self.ranks

    @property
    def _teacher_weights(self) -> int:
        if self.teacher is None or self.teacher_place == "elsewhere":
            return 0
        if self.teacher_place == "host":
            # tables stay, and one layer is there at a time
            return self.teacher_bytes * (_tables(self.teacher) + _layer(self.teacher))
        return self.teacher_bytes * self.teacher.parameters().total // self.ranks

    @property
    def _gathered(self) -> int:
        """What is whole on every rank: tables, heads, and the layers at work."""
        if self.ranks == 1:
            return 0
        models = [(one, FLOAT) for one in self.students]
        if self.teacher is not None:
            models.append((self.teacher, self.teacher_bytes))
        tables = sum(value * _tables(one) for one, value in models)
        return tables + GATHERED_LAYERS * max(value * _layer(one) for one, value in models)

    @property
    def _tokens(self) -> tuple[int, int]:
        return self.micro_batch_tokens, self.window

    @property
    def _how(self) -> dict[str, bool]:
        return {"autocast": self.autocast, "document_mask": self.document_mask}

    def _at_work(self, shape: Shape) -> int:
        """What the backward pass of a layer needs beside what is kept."""
        again = 0
        if self.activation_checkpointing:
            # its input stayed
            again = layer_bytes(shape, *self._tokens, **self._how)
            again -= self._hidden_bytes(shape, FLOAT)
        transient = backward_transient(shape, autocast=self.autocast)
        return again + self.micro_batch_tokens * transient

    def _hidden_bytes(self, shape: Shape, value: int) -> int:
        return value * self.micro_batch_tokens * shape.hidden

    def _head_gradients(self, shape: Shape) -> int:
        """Of a student's hidden states, in the dtype of the head's product, and of its head."""
        return self._hidden_bytes(shape, self._product_bytes) + FLOAT * _head(shape)

    @property
    def _product_bytes(self) -> int:
        """Of a number in the product of a student's head, which a CPU does in fp32."""
        return HALF if self.autocast and self.device != "cpu" else FLOAT

    @property
    def _chunks(self) -> int:
        """The buffers of the loss, and what is cast or filled up for its products."""
        padded = padded_rows(self.students[0].vocabulary)
        rows = min(chunk_rows(self.device, self.students[0].vocabulary), self.micro_batch_tokens)
        block = block_rows(self.device, padded, rows)
        # logits of a chunk, probabilities of a block
        total = FLOAT * padded * (rows + block)
        total += sum(self._ready(one, FLOAT, self._product_bytes) for one in self.students)
        if self.teacher is not None:
            # probabilities, and for other divergences than the forward KL their logarithms
            total += (1 if self.divergence == "forward_kl" else 2) * FLOAT * padded * rows
            # what lives for a moment within a block
            more = (self.temperature != 1.0) + (self.students[0].architecture == "gemma2")
            total += (TEMPORARIES[self.divergence] + more) * FLOAT * padded * block
            value = FLOAT if self.device == "cpu" else self.teacher_bytes
            total += self._ready(self.teacher, self.teacher_bytes, value)
        return total

    def _ready(self, shape: Shape, stored: int, value: int) -> int:
        """Copies of hidden states and head for a product in numbers of `value` bytes."""
        states = 0 if stored == value else self._hidden_bytes(shape, value)
        is_whole = padded_rows(shape.vocabulary) == shape.vocabulary
        return states + (0 if stored == value and is_whole else value * _head(shape))


def loop_memory(
    training: TrainingSection,
    run: RunSection,
    *,
    students: tuple[Shape, ...],
    teacher: Shape | None,
    stored_bytes: int,
    window: int,
    gpu: str | None,
    ranks: int = 1,
) -> LoopMemory:
    """The loop of one of `ranks` processes by a recipe's settings.

    stored_bytes: of one of the teacher's weights as it is stored. gpu: its kind; without one the
    recipe's own device counts, a CPU unless it says otherwise.
    """
    device = "cuda" if gpu is not None or run.device.startswith("cuda") else "cpu"
    has_bf16 = device == "cuda" and (gpu is None or GPUS[gpu].has_bf16)
    share = training.batch_tokens // ranks
    micro = min(training.micro_batch_tokens or share, share)
    autocast = training.precision == "bf16" or (training.precision == "auto" and has_bf16)
    place = "device" if run.teacher_device == "same" else "elsewhere"
    return LoopMemory(
        students=students,
        teacher=teacher,
        window=window,
        micro_batch_tokens=micro,
        micro_batches=-(-share // micro),
        autocast=autocast,
        teacher_bytes={
            "auto": HALF if autocast and device == "cuda" else stored_bytes,
            "stored": stored_bytes,
            "fp32": FLOAT,
            "bf16": HALF,
        }[training.teacher_dtype],
        activation_checkpointing=training.activation_checkpointing,
        document_mask=training.document_mask,
        divergence=training.divergence,
        temperature=training.temperature,
        device=device,
        ranks=ranks,
        teacher_place="host" if run.teacher_offload else place,
        checkpoints=True,
    )


def _head(shape: Shape) -> int:
    """Numbers of a head that is filled up for its product."""
    return padded_rows(shape.vocabulary) * shape.hidden


def _tables(shape: Shape) -> int:
    """Parameters of the tables and an untied head."""
    counts = shape.parameters()
    return counts.embedding + counts.head


def _layer(shape: Shape) -> int:
    counts = shape.parameters()
    return (counts.attention + counts.ffn + counts.norms) // shape.layers
