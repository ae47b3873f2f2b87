"""The published sizes: the feed-forward formula against the papers' table, and the known parameter counts."""

import pytest

from infra.errors import ConfigError
from models.hf_format import config_from_hf, hf_config
from models.llama import parameter_count
from models.presets import ffn_width, preset, preset_names, scratch_config


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("llama1-7b", ffn_width(4096)),
        ("llama1-13b", ffn_width(5120)),
        ("llama1-33b", ffn_width(6656)),
        ("llama1-65b", ffn_width(8192)),
        ("llama2-34b", ffn_width(8192)),
        ("llama2-70b", ffn_width(8192, multiple_of=4096, multiplier=1.3)),
        ("llama3-8b", ffn_width(4096, multiple_of=1024, multiplier=1.3)),
        ("llama3-70b", ffn_width(8192, multiple_of=4096, multiplier=1.3)),
        ("llama3.1-405b", ffn_width(16384, multiple_of=4096, multiplier=1.2)),
        ("llama3.2-1b", ffn_width(2048, multiple_of=256, multiplier=1.5)),
        ("llama3.2-3b", ffn_width(3072, multiple_of=256, multiplier=1.0)),
    ],
)
def test_feed_forward_formula_gives_the_table(name: str, width: int) -> None:
    assert preset(name).ffn_dim == width


def test_feed_forward_widths_of_the_paper() -> None:
    assert [ffn_width(dim) for dim in (4096, 5120, 6656, 8192)] == [11008, 13824, 17920, 22016]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama1-7b", 6_738_415_616),
        ("llama1-13b", 13_015_864_320),
        ("llama1-33b", 32_528_943_616),
        ("llama1-65b", 65_285_660_672),
        ("llama2-7b", 6_738_415_616),
        ("llama2-70b", 68_976_648_192),
        ("codellama-7b", 6_738_546_688),
        ("codellama-34b", 33_743_970_304),
        ("llama3-8b", 8_030_261_248),
        ("llama3.1-70b", 70_553_706_496),
        ("llama3.1-405b", 405_853_388_800),
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.2-3b", 3_212_749_824),
    ],
)
def test_parameter_counts_of_the_published_checkpoints(name: str, parameters: int) -> None:
    assert parameter_count(preset(name)) == parameters


def test_context_vocabulary_and_rope_by_family() -> None:
    rows = {
        "llama1-": (2048, 1e4, {32_000}, None),
        "llama2-": (4096, 1e4, {32_000}, None),
        "codellama-": (16_384, 1e6, {32_016, 32_000}, None),
        "llama3-": (8192, 5e5, {128_256}, None),
        "llama3.1-": (131_072, 5e5, {128_256}, 8.0),
        "llama3.2-": (131_072, 5e5, {128_256}, 32.0),
    }
    for name in preset_names():
        context, theta, vocabularies, factor = rows[name.rsplit("-", 1)[0] + "-"]
        config = preset(name)
        assert (config.context, config.rope_theta) == (context, theta)
        assert config.vocab_size in vocabularies
        assert (config.rope_scaling.factor if config.rope_scaling else None) == factor
        assert config.tied == name.startswith("llama3.2")
        assert config_from_hf(hf_config(config)) == config
    assert len(preset_names()) == 19


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"llama9.*llama3\.1-8b"):
        preset("llama9")


def test_scratch_config_follows_the_formula() -> None:
    tiny = scratch_config(dim=128, layers=4, heads=4, kv_heads=2, vocab_size=1024, context=256)
    assert tiny.ffn_dim == 352 and tiny.tied and tiny.head_dim == 32
    assert parameter_count(tiny) == 4 * (3 * 128 * 128 + 3 * 128 * 352 + 256) + 1024 * 128 + 128
    with pytest.raises(ConfigError, match="heads 5"):
        scratch_config(dim=128, layers=4, heads=5, kv_heads=1, vocab_size=1024, context=256)
