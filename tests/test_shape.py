import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest

from capgap.errors import UserError
from capgap.models.shape import ARCHITECTURES, Shape, ladder_shape, smallest_ladder_size

LLAMA_2_7B = Shape("llama", 4096, 32, 32, 32, 128, 11008, 32000, 4096, False)
MINIMA_3B = Shape("llama", 3072, 24, 24, 24, 128, 8192, 49216, 4096, False)
GPT2_SMALL = Shape("gpt2", 768, 12, 12, 12, 64, 3072, 50257, 1024, True)
PYTHIA_70M = Shape("gpt_neox", 512, 6, 8, 8, 64, 2048, 50304, 2048, False)

MISTRAL_7B = Shape("mistral", 4096, 32, 32, 8, 128, 14336, 32000, 32768, False)
QWEN2_HALF_B = Shape("qwen2", 896, 24, 14, 2, 64, 4864, 151936, 131072, True)
QWEN3_0_6B = Shape("qwen3", 1024, 28, 16, 8, 128, 3072, 151936, 40960, True)
GEMMA2_2B = Shape("gemma2", 2304, 26, 8, 4, 256, 9216, 256000, 8192, True)
OLMO2_7B = Shape("olmo2", 4096, 32, 32, 32, 128, 11008, 100352, 4096, False)
GEMMA3_270M = Shape("gemma3_text", 640, 18, 4, 1, 256, 2048, 262144, 32768, True)
SMOLLM3 = Shape("smollm3", 2048, 36, 16, 4, 128, 11008, 128256, 65536, True)
GRANITE_2B = Shape("granite", 2048, 40, 32, 8, 64, 8192, 49155, 131072, True)
OLMO3_7B = Shape("olmo3", 4096, 32, 32, 32, 128, 11008, 100278, 65536, False)
PHI3_MINI = Shape("phi3", 3072, 32, 32, 32, 96, 8192, 32064, 4096, False)


@pytest.mark.parametrize(
    ("shape", "part", "count"),
    [
        # published counts: the models' cards
        (LLAMA_2_7B, "total", 6_738_415_616),
        (GPT2_SMALL, "total", 124_439_808),
        (PYTHIA_70M, "total", 70_426_624),
        (PYTHIA_70M, "non_embedding", 18_915_328),
        (MISTRAL_7B, "total", 7_241_732_096),
        (QWEN2_HALF_B, "total", 494_032_768),
        (QWEN3_0_6B, "total", 596_049_920),
        (GEMMA2_2B, "total", 2_614_341_888),
        (OLMO2_7B, "total", 7_298_617_344),
        (PHI3_MINI, "total", 3_821_079_552),
        (GEMMA3_270M, "total", 268_098_176),
        (SMOLLM3, "total", 3_075_098_624),
        (GRANITE_2B, "total", 2_533_531_648),
        (OLMO3_7B, "total", 7_298_011_136),
    ],
)
def test_published_counts(shape, part, count):
    assert shape.parameters().as_dict()[part] == count


def test_minima_has_3_02_billion():
    assert MINIMA_3B.parameters().total == pytest.approx(3.02e9, rel=0.002)


def sizes(first, last, factor):
    return [int(first * factor**step) for step in range(1 + int(math.log(last / first, factor)))]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ladder_hits_its_target(architecture):
    for size in sizes(6144, 2e10, 1.07):
        shape = ladder_shape(architecture, size, vocabulary=2048, positions=256)
        assert shape.parameters().non_embedding == pytest.approx(
            size, rel=0.005 if size >= 20_000 else 0.01
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("factor", [1.3, 1.4, 1.6])
def test_neighbours_on_the_ladder_look_alike(architecture, factor):
    ladder = [
        ladder_shape(architecture, size, vocabulary=2048, positions=256)
        for size in sizes(20_000, 1e10, factor)
    ]
    for small, large in pairwise(ladder):
        assert 0 <= large.layers - small.layers <= max(1, small.layers // 6)
        assert 0.84 < large.hidden / small.hidden < 1.4
        # narrower only where a layer was added
        assert large.hidden >= small.hidden or large.layers > small.layers
        assert 0.65 < (large.ffn / large.hidden) / (small.ffn / small.hidden) < 1.5


@pytest.mark.parametrize(
    ("size", "layers"), [(50_000, 2), (300_000, 3), (900_000, 4), (85_000_000, 12), (7e9, 33)]
)
def test_depth_grows_slowly(size, layers):
    assert ladder_shape("llama", int(size), vocabulary=2048, positions=256).layers == layers


def test_impossible_sizes_name_the_smallest():
    with pytest.raises(UserError, match=str(smallest_ladder_size())):
        ladder_shape("llama", smallest_ladder_size() - 1, vocabulary=256, positions=64)
    with pytest.raises(UserError, match="gpt_neox"):
        ladder_shape("mamba", 10**6, vocabulary=256, positions=64)


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        (GPT2_SMALL, {"head_size": 32}),
        (GPT2_SMALL, {"kv_heads": 4}),
        (PYTHIA_70M, {"hidden": 500}),
        (PYTHIA_70M, {"heads": 512, "kv_heads": 512, "head_size": 1}),
        (LLAMA_2_7B, {"kv_heads": 5}),
        (LLAMA_2_7B, {"hidden": 4095}),
        (LLAMA_2_7B, {"head_size": 127}),
        (LLAMA_2_7B, {"ffn": 0}),
        (LLAMA_2_7B, {"architecture": "mamba"}),
    ],
)
def test_impossible_shapes(shape, changes):
    with pytest.raises(UserError, match="impossible"):
        replace(shape, **changes)


def test_no_torch_is_imported():
    code = (
        "import sys, capgap.sizes, capgap.models.shape, capgap.prune.shape;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
