"""How many tokens the loss takes at once. Imports no torch."""

# Words x tokens of a chunk, and its tokens: matrix products of fewer rows are slower, and what is
# done once a chunk is done less often; by measurement on CPUs (docs/benchmarks.md)
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**26}
CHUNK_ROWS = {"cpu": (128, 512), "cuda": (128, 2**20)}
# Words x tokens of a block
BLOCK_ELEMENTS = 2**19


def chunk_rows(device: str, vocabulary: int) -> int:
    """Tokens whose logits exist at once, on a type of device."""
    kind = device if device in CHUNK_ELEMENTS else "cuda"
    least, most = CHUNK_ROWS[kind]
    return min(max(least, CHUNK_ELEMENTS[kind] // vocabulary), most)


def block_rows(device: str, vocabulary: int, rows: int) -> int:
    """Tokens of a block: on a GPU all of a chunk."""
    return rows if device != "cpu" else min(rows, max(1, BLOCK_ELEMENTS // vocabulary))
