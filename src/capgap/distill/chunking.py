"""How many tokens the loss takes at once, and of how many rows its heads are. No torch."""

# Words x tokens of a chunk, and its tokens: matrix products of fewer rows are slower, and what is
# done once a chunk is done less often; by measurement on CPUs (docs/benchmarks.md)
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**26}
CHUNK_ROWS = {"cpu": (128, 512), "cuda": (128, 2**20)}
# Words x tokens of a block
BLOCK_ELEMENTS = 2**19
# A GPU's matrix units take whole tiles: with 50,257 or 151,665 words no row of logits would begin
# where one does
HEAD_MULTIPLE = 64


def padded_rows(vocabulary: int) -> int:
    """Rows of a head that is filled up to whole tiles."""
    return -(-vocabulary // HEAD_MULTIPLE) * HEAD_MULTIPLE


def chunk_rows(device: str, vocabulary: int) -> int:
    """Tokens whose logits exist at once, on a type of device."""
    kind = device if device in CHUNK_ELEMENTS else "cuda"
    least, most = CHUNK_ROWS[kind]
    rows = min(max(least, CHUNK_ELEMENTS[kind] // vocabulary), most)
    # a GPU's products come in tiles of so many
    return rows if kind == "cpu" else rows // least * least


def block_rows(device: str, vocabulary: int, rows: int) -> int:
    """Tokens of a block: on a GPU all of a chunk."""
    return rows if device != "cpu" else min(rows, max(1, BLOCK_ELEMENTS // vocabulary))
