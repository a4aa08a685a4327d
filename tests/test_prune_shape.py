import pytest

from capgap.errors import UserError
from capgap.models.families import FAMILIES
from capgap.models.shape import ARCHITECTURES, Shape, ladder_shape, smallest_ladder_size
from capgap.prune.shape import pruned_shape

LLAMA_2_7B = Shape("llama", 4096, 32, 32, 32, 128, 11008, 32000, 4096, False)
LLAMA_3_70B = Shape("llama", 8192, 80, 64, 8, 128, 28672, 128256, 8192, False)


def ladder(architecture, size):
    return ladder_shape(architecture, size, vocabulary=512, positions=128)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size", [100_000, 300_000, 1_000_000, 85_000_000])
@pytest.mark.parametrize("ratio", [1.01, 1.1, 1.4, 2, 2.5, 4, 8])
def test_count_is_met_inside_the_teacher(architecture, size, ratio):
    teacher = ladder(architecture, size)
    wanted = int(teacher.parameters().non_embedding / ratio)
    student = pruned_shape(teacher, wanted)
    assert student.parameters().non_embedding == pytest.approx(wanted, rel=0.005)
    for name in ("hidden", "layers", "heads", "kv_heads", "ffn"):
        assert getattr(student, name) <= getattr(teacher, name)
    for name in ("architecture", "head_size", "vocabulary", "positions", "tied"):
        assert getattr(student, name) == getattr(teacher, name)
    # proportions stay near those of the ladder, as far as whole heads and the teacher allow
    own = ladder(architecture, wanted)
    assert 0.4 < (student.hidden / student.layers) / (own.hidden / own.layers) < 2.5
    assert 0.4 < (student.ffn / student.hidden) / (own.ffn / own.hidden) < 2.5


@pytest.mark.parametrize("teacher", [LLAMA_2_7B, LLAMA_3_70B])
def test_large_models_and_shared_key_value_heads(teacher):
    wanted = int(0.4 * teacher.parameters().non_embedding)
    student = pruned_shape(teacher, wanted)
    assert student.parameters().non_embedding == pytest.approx(wanted, rel=0.005)
    assert student.heads / student.kv_heads == teacher.heads / teacher.kv_heads
    assert student.hidden % 64 == 0


def test_students_of_one_size_have_one_shape_whatever_their_llama_teacher():
    for teacher in (52_000, 90_000, 135_000, 200_000, 320_000, 480_000, 1_000_000):
        for size in (30_000, 40_000, 50_000):
            assert pruned_shape(ladder("llama", teacher), size) == ladder("llama", size)


def test_the_ladders_own_shape_is_found_where_it_fits():
    # the ladder's 250k and 400k models have the same head size as this teacher
    teacher = ladder("gpt2", 1_000_000)
    for size in (250_000, 400_000):
        own = ladder("gpt2", size)
        assert pruned_shape(teacher, own.parameters().non_embedding) == own


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_teachers_own_count_gives_its_shape(architecture):
    teacher = ladder(architecture, 300_000)
    assert pruned_shape(teacher, teacher.parameters().non_embedding) is teacher


def test_impossible_targets_name_both_numbers():
    teacher = ladder("llama", 300_000)
    own = teacher.parameters().non_embedding
    with pytest.raises(UserError, match=f"{own + 1}.*{own}"):
        pruned_shape(teacher, own + 1)
    with pytest.raises(UserError, match=f"1000 .*{smallest_ladder_size()}"):
        pruned_shape(teacher, 1000)
    # a single wide layer with a single wide head cannot become small
    block = Shape("gpt2", 128, 1, 1, 1, 128, 512, 512, 128, True)
    smallest = 4 * 128**2 + 4 * 128 + 2 * 128 + 1 + 128 + 6 * 128
    with pytest.raises(UserError, match=f"{smallest - 1} .*{smallest}"):
        pruned_shape(block, smallest - 1)
    assert pruned_shape(block, smallest).ffn == 1


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if FAMILIES[kind].square])
def test_students_of_sweeps_are_what_other_software_loads(kind):
    teacher = Shape(kind, 64, 2, 4, 2, 16, 96, 300, 64, True)
    for size in (8_000, 12_000, 30_000, 40_000):
        shape = pruned_shape(teacher, size)
        assert shape.hidden == shape.heads * shape.head_size
