"""How much memory a training loop needs at its peak, by part. Imports no torch.

It follows `capgap.train.loop` through a step. Weights are fp32, AdamW has two more numbers of
each, gradients are fp32; with several micro-batches they stay from one to the next. What is needed
beside them differs from phase to phase, and the largest phase is the peak:

    teacher_forward   the teacher's layer at work; no gradient, so nothing of it stays
    loss              activations, hidden states, the gradients of hidden states and heads, a chunk
    backward          the same gradients; of a layer that is at work gradients of its activations,
                      and with checkpointing its activations, computed again
    first_layer       the backward pass at its last layer: all gradients but those of the tables
    tables            all gradients; of a table that is the head as well, both beside their sum

What layers keep for the backward pass is counted from transformers' models under sdpa, or eager
attention where scores are capped (Gemma 2); tests compare it with what autograd saves. Widths of a
token:

    hidden     the residual stream, a norm's input and output, a linear layer's input
    query      of all query heads; the attention's output is as wide
    key        of all key-value heads
    attended   keys or values as the attention takes them: `key`, or with a mask `query`, since
               grouped heads are repeated then
    values     where queries, keys and values come out of one product, and values are a view of it:
               all three; with a mask and grouped heads `query`
    neurons    of the FFN
    heads      a number for each query head (the attention's normaliser, a head norm's scale)
    kv_heads   a number for each key-value head
    scores     heads x window, where the attention is not fused
    scalar     a number (a norm's mean or scale)
"""

from collections import Counter
from dataclasses import dataclass, field

from capgap.distill import block_rows, chunk_rows, padded_rows
from capgap.machine import GPUS
from capgap.models.shape import Shape
from capgap.train.recipe import FILE_BYTES, RunSection, TrainingSection

FLOAT, HALF = 4, 2
PARTS = (
    *("weights", "gradients", "optimizer", "activations"),
    *("loss_chunks", "teacher", "gathered", "checkpoint"),
)
# Blocks of numbers beside the student's logits and probabilities, by divergence: measured; a
# temperature and a cap add one each
TEMPORARIES = {"forward_kl": 1, "reverse_kl": 5, "total_variation": 5, "jsd": 8, "skewed_kl": 8}
# Of FSDP whole at once: weights of a layer and of the next, gradients of a layer, and the copy of
# them that is sent
GATHERED_LAYERS = 4


@dataclass(frozen=True)
class Saved:
    """How many tensors of each width a layer saves; two are added up.

    plain: in fp32, without autocast. wide, low: under bf16 autocast those in fp32, and in bf16.
    positions: numbers in fp32 a position, which all rows share unless documents are masked.
    """

    plain: Counter[str] = field(default_factory=Counter)
    wide: Counter[str] = field(default_factory=Counter)
    low: Counter[str] = field(default_factory=Counter)
    positions: int = 0

    def __add__(self, other: "Saved") -> "Saved":
        plain, wide, low = self.plain + other.plain, self.wide + other.wide, self.low + other.low
        return Saved(plain, wide, low, self.positions + other.positions)


_LLAMA = Saved(
    plain=Counter(hidden=6, query=2, attended=2, neurons=4, heads=1, scalar=2),
    wide=Counter(hidden=4, heads=1, scalar=2),
    # every linear layer has its own copy of its input in bf16
    low=Counter(hidden=5, query=2, attended=2, neurons=4),
)
# queries are scaled by their position
_SCALED_QUERIES = Saved(positions=1)
# queries and keys have norms, over all heads
_WHOLE_NORMS = Saved(Counter(query=2, key=2, scalar=2), Counter(query=2, key=2, scalar=2))
# or over each
_HEAD_NORMS = Saved(
    plain=Counter(query=2, key=2, heads=1, kv_heads=1),
    wide=Counter(query=1, key=1, heads=1, kv_heads=1),
    low=Counter(query=1, key=1),
)
# norms behind attention and FFN as well
_FOUR_NORMS = Saved(Counter(hidden=4, scalar=2), Counter(hidden=4, scalar=2))
# one product for queries, keys and values, and one for gate and neurons: fewer copies of inputs
_JOINED = Saved(
    plain=Counter(query=1, attended=-1, values=1),
    low=Counter(hidden=-3, query=1, attended=-1, values=1),
)
_QWEN3 = _LLAMA + _HEAD_NORMS

SAVED: dict[str, Saved] = {
    **dict.fromkeys(("llama", "mistral", "smollm3", "granite", "qwen2"), _LLAMA),
    "ministral3": _LLAMA + _SCALED_QUERIES,
    "qwen3": _QWEN3,
    "gemma2": Saved(
        plain=Counter(hidden=10, query=4, scores=2, neurons=4, scalar=4),
        wide=Counter(hidden=8, scores=1, scalar=4),
        low=Counter(hidden=5, query=4, scores=2, neurons=4),
    ),
    "gemma3_text": _QWEN3 + _FOUR_NORMS + Saved(low=Counter(query=1, key=1)),
    **dict.fromkeys(("olmo2", "olmo3"), _LLAMA + _WHOLE_NORMS),
    "phi3": _LLAMA + _JOINED,
    "gpt_neox": Saved(
        plain=Counter(hidden=3, query=4, values=1, neurons=2, heads=1, scalar=4),
        wide=Counter(hidden=1, heads=1, scalar=4),
        low=Counter(hidden=2, query=4, values=1, neurons=2),
    ),
    "gpt2": Saved(
        plain=Counter(hidden=4, query=1, values=1, neurons=5, heads=1, scalar=4),
        wide=Counter(hidden=2, heads=1, scalar=4),
        low=Counter(hidden=2, query=1, values=1, neurons=5),
    ),
}


def kept_bytes(
    shape: Shape,
    tokens: int,
    window: int,
    *,
    autocast: bool,
    document_mask: bool = False,
    checkpointed: bool = False,
) -> int:
    """Bytes that a model keeps of `tokens` in rows of `window` from its forward to its backward
    pass, in its layers and outside of them. `checkpointed`: of a layer its input alone."""
    layer = FLOAT * shape.hidden * tokens
    if not checkpointed:
        layer = layer_bytes(shape, tokens, window, autocast=autocast, document_mask=document_mask)
    # token ids, positions, and what the final norm keeps: an RMS norm its scaled input too
    position = 8 if shape.family.learns_positions else 2 * FLOAT * shape.head_size
    states, numbers = (1, 2) if shape.family.norm_bias else (2, 1)
    outside = tokens * (8 + FLOAT * (states * shape.hidden + numbers))
    outside += position * (tokens if document_mask else window)
    outside += FLOAT * shape.hidden if shape.family.norm_offset else 0
    return shape.layers * layer + outside


def layer_bytes(
    shape: Shape, tokens: int, window: int, *, autocast: bool, document_mask: bool = False
) -> int:
    """Bytes that a layer keeps, the bf16 copies of its matrices among them."""
    widths = _widths(shape, window, document_mask)
    saved = SAVED[shape.architecture]
    # every call of the attention makes numbers of its mask
    mask = window if document_mask and "scores" not in saved.plain else 0
    # a norm whose weight is added to 1 keeps the sum
    sums = saved.positions * (tokens if document_mask else window)
    if shape.family.norm_offset:
        of_heads = sum(axes == ("head",) for axes in shape.family.attention.values())
        sums += len(shape.family.layer_norms) * shape.hidden + of_heads * shape.head_size

    def total(tensors: Counter[str]) -> int:
        return sum(number * widths[name] for name, number in tensors.items())

    if not autocast:
        return FLOAT * (tokens * (total(saved.plain) + mask) + sums)
    wide = FLOAT * (tokens * total(saved.wide) + sums)
    return wide + HALF * tokens * (total(saved.low) + mask) + cast_bytes(shape)


def cast_bytes(shape: Shape) -> int:
    """Bytes of the bf16 copies of a layer's matrices, which autocast makes."""
    counts = shape.parameters()
    sizes = shape.axis_sizes
    tensors = [*shape.family.attention.values(), *shape.family.ffn.values()]
    vectors = sum(sizes[axes[0]] for axes in tensors if len(axes) == 1)
    return HALF * ((counts.attention + counts.ffn) // shape.layers - vectors)


def _widths(shape: Shape, window: int, document_mask: bool) -> dict[str, int]:
    sizes = shape.axis_sizes
    repeated = document_mask and shape.heads != shape.kv_heads
    return sizes | {
        "attended": sizes["query" if repeated else "key"],
        "values": sizes["query" if repeated else "qkv"],
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "scores": shape.heads * window,
        "scalar": 1,
    }


@dataclass(frozen=True)
class LoopMemory:
    """Memory of one process of a loop: the students of a teacher, or of none; shapes all.

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
        before = 0 if self.micro_batches == 1 else self._weights
        # of the first student's token table they come last
        late = 0 if before else FLOAT * first.parameters().embedding // self.ranks
        kept = sum(
            kept_bytes(one, *self._rows, **self._how, checkpointed=self.activation_checkpointing)
            for one in self.students
        )
        hidden = sum(self._hidden_bytes(one, FLOAT) for one in self.students)
        heads = sum(self._head_gradients(one) for one in self.students)
        teacher = self._teacher_weights
        teacher += self._hidden_bytes(self.teacher, self.teacher_bytes) if self.teacher else 0
        # beside the sum of a tied table's two gradients those themselves; of several ranks every
        # one has them whole
        tables = 2 if first.tied or self.ranks > 1 else 0
        found = {
            "loss": {
                "gradients": before,
                "activations": kept + hidden,
                "loss_chunks": self._chunks + heads,
                "teacher": teacher,
            },
            "backward": {
                "gradients": before,
                "activations": kept + self._at_work(last),
                "loss_chunks": heads,
            },
            "first_layer": {
                "gradients": self._weights - late,
                "activations": self._at_work(first),
                "loss_chunks": self._head_gradients(first),
            },
            "tables": {
                "gradients": self._weights,
                "loss_chunks": tables * FLOAT * first.vocabulary * first.hidden,
            },
        }
        if self.teacher is not None:
            work = self.micro_batch_tokens * self._forward_transient(self.teacher)
            found["teacher_forward"] = {"gradients": before, "teacher": teacher + work}
        always = dict.fromkeys(PARTS, 0) | {
            "weights": self._weights,
            "optimizer": 2 * self._weights,
            "teacher": self._teacher_weights,
            "gathered": self._gathered,
            "checkpoint": self._checkpoint if self.device == "cpu" else 0,
        }
        return {name: always | parts for name, parts in found.items()}

    def peak(self) -> tuple[str, dict[str, int]]:
        """The largest phase, and its bytes by part."""
        return max(self.phases().items(), key=lambda phase: sum(phase[1].values()))

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.peak()[1].values())

    def at_most(self) -> dict[str, int]:
        """Bytes of every part in the phase where it is largest."""
        phases = self.phases().values()
        return {part: max(phase[part] for phase in phases) for part in PARTS}

    def in_host(self) -> int:
        """Bytes that a process with a GPU has in the host's memory."""
        offloaded = 0
        if self.teacher is not None and self.teacher_place == "host":
            offloaded = self.teacher_bytes * _layer(self.teacher) * self.teacher.layers
        return offloaded + self._checkpoint

    @property
    def _checkpoint(self) -> int:
        """The copy of weights and moments that is being written, and of its file."""
        copied = 3 * self._weights
        return copied + 2 * min(copied, FILE_BYTES) if self.checkpoints else 0

    @property
    def _rows(self) -> tuple[int, int]:
        return self.micro_batch_tokens, self.window

    @property
    def _how(self) -> dict[str, bool]:
        return {"autocast": self.autocast, "document_mask": self.document_mask}

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
        """The weights that are whole on every rank: tables, heads, and the layers at work."""
        if self.ranks == 1:
            return 0
        models = [(one, FLOAT) for one in self.students]
        models += [] if self.teacher is None else [(self.teacher, self.teacher_bytes)]
        tables = sum(value * _tables(one) for one, value in models)
        return tables + GATHERED_LAYERS * max(value * _layer(one) for one, value in models)

    def _forward_transient(self, shape: Shape) -> int:
        """Bytes of a token that a layer of the teacher needs at once: what an FFN holds before its
        last product, or the attention; and the residual stream with a norm beside it."""
        widths = _widths(shape, self.window, document_mask=False)
        ffn = shape.family.ffn
        gated = "gate_up" in str(ffn) or "mlp.gate_proj.weight" in ffn
        attention = 2 * widths["query"] + 4 * widths["key"]
        if "scores" in SAVED[shape.architecture].plain:
            attention += 3 * widths["scores"]
        work = max((3 if gated else 2) * shape.ffn, attention)
        return self.teacher_bytes * (3 * shape.hidden + work)

    def _at_work(self, shape: Shape) -> int:
        """Bytes that the backward pass of a layer needs beside what is kept: gradients of the
        factors of the FFN's last product, or of its one activation, and of the residual stream."""
        value = HALF if self.autocast else FLOAT
        factors = 2 if SAVED[shape.architecture].plain["neurons"] > 2 else 1
        per_token = factors * value * shape.ffn + 2 * FLOAT * shape.hidden
        again = 0
        if self.activation_checkpointing:
            # its input stayed
            again = layer_bytes(shape, *self._rows, **self._how) - self._hidden_bytes(shape, FLOAT)
        return again + self.micro_batch_tokens * per_token

    def _hidden_bytes(self, shape: Shape, value: int) -> int:
        return value * self.micro_batch_tokens * shape.hidden

    def _head_gradients(self, shape: Shape) -> int:
        """Gradients of hidden states, in the dtype of the head's product, and of the head."""
        return self._hidden_bytes(shape, self._product_bytes) + FLOAT * _head(shape)

    @property
    def _product_bytes(self) -> int:
        """Bytes of a number in the product of a student's head, which a CPU does in fp32."""
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
    autocast = has_bf16 if training.precision == "auto" else training.precision != "fp32"
    by_dtype = {"stored": stored_bytes, "fp32": FLOAT, "bf16": HALF}
    by_dtype["auto"] = HALF if autocast and device == "cuda" else stored_bytes
    place = "device" if run.teacher_device == "same" else "elsewhere"
    return LoopMemory(
        students,
        teacher if training.alpha > 0 else None,
        window,
        micro,
        micro_batches=-(-share // micro),
        autocast=autocast,
        teacher_bytes=by_dtype[training.teacher_dtype],
        activation_checkpointing=training.activation_checkpointing,
        document_mask=training.document_mask,
        divergence=training.divergence,
        temperature=training.temperature,
        device=device,
        ranks=min(run.shard_size or ranks, ranks),
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
