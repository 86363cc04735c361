"""Settings: presets, overrides, and every problem reported at once."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_imagic.errors import ConfigError
from lowmem_imagic.settings.presets import PRESETS, preset
from lowmem_imagic.settings.stages import BLOCKS, EditConfig, SampleConfig, strengths
from lowmem_imagic.settings.text import parse_strength


def test_presets_for_large_networks() -> None:
    """Large networks get fewer trained weights from a preset, and whatever else was chosen; "paper" is the paper's."""
    usual, large = (preset("balanced").for_group(group).finetune for group in ("", "large"))
    assert (usual.adapt, usual.lora_rank, large.adapt, large.lora_rank) == ("all", 16, "attn+ff", 8)
    chosen = preset("balanced", {"finetune": {"lora_rank": 4, "steps": 3}}).for_group("large").finetune
    assert (chosen.lora_rank, chosen.steps, chosen.adapt) == (4, 3, "attn+ff")
    asked = preset("balanced", {"finetune": {"lora_rank": 16}}).for_group("large").finetune
    assert (asked.lora_rank, asked.adapt) == (16, "attn+ff")
    usual = preset("balanced")
    replaced = dataclasses.replace(usual, finetune=dataclasses.replace(usual.finetune, lora_rank=2, steps=5))
    assert (replaced.for_group("large").finetune.lora_rank, replaced.for_group("large").finetune.steps) == (2, 5)
    assert replaced.for_group("").finetune == replaced.finetune
    paper = preset("paper")
    assert paper.for_group("large").finetune == paper.finetune


@pytest.mark.parametrize("name", PRESETS)
def test_every_group_of_networks_has_a_sampler_of_its_own(name: str) -> None:
    """Settings of all stages follow the group, so far as they were not chosen; usual networks have the usual ones."""
    usual, flow = preset(name).for_group(""), preset(name).for_group("flow")
    assert usual.sample.scheduler == "DDIM" and flow.sample.scheduler in ("FireFlow", "Euler")
    assert flow.sample == dataclasses.replace(
        usual.sample, scheduler=flow.sample.scheduler, guidance_scale=flow.sample.guidance_scale
    )
    chosen = preset(name, {"sample": {"scheduler": "Euler"}, "embed": {"learning_rate": 0.5}}).for_group("flow")
    assert (chosen.sample.scheduler, chosen.embed.learning_rate) == ("Euler", 0.5)
    assert EditConfig.from_dict(flow.to_dict()) == flow


def test_a_source_prompt_is_recorded_with_its_scale():
    """A source prompt is written with its scale, also with the default one, which may be another in a later version. An
    edit without one has neither, as in versions that knew none."""
    plain = preset("balanced").to_dict()["sample"]
    assert not {"source_prompt", "edit_guidance_scale"} & plain.keys()
    for chosen in ({"source_prompt": "a cat"}, {"edit_guidance_scale": 2.0}):
        config = preset("balanced", {"sample": chosen})
        sample = config.to_dict()["sample"]
        assert EditConfig.from_dict(config.to_dict()) == config
        assert sample == plain | chosen | {"edit_guidance_scale": config.sample.edit_guidance_scale}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    """A preset written as JSON and read back is the same value."""
    config = preset(name)
    assert EditConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_paper_preset_has_the_papers_settings():
    """Section 3.3: 1000 steps at 2e-3 on the embedding, then 1500 steps, one draw each."""
    config = preset("paper")
    assert (config.embed.steps, config.embed.learning_rate, config.embed.draws) == (1000, 2e-3, 1)
    assert (config.finetune.steps, config.finetune.draws) == (1500, 1)


def test_fast_is_cheaper_than_balanced_and_both_than_paper():
    """UNet passes grow from fast over balanced to paper."""
    passes = [sum(stage.passes for stage in (c.embed, c.finetune)) for c in map(preset, ("fast", "balanced", "paper"))]
    assert passes == sorted(passes) and len(set(passes)) == 3


def test_overrides_change_only_what_they_name():
    """An override changes its setting; everything else is the preset's."""
    base, changed = preset("balanced"), preset("balanced", {"embed": {"steps": 7}, "": {"seed": 9}})
    assert changed == dataclasses.replace(base, embed=dataclasses.replace(base.embed, steps=7), seed=9)


def test_settings_are_frozen():
    """A config cannot be changed after it was made."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("fast").embed.steps = 1  # type: ignore[misc]


def test_every_problem_of_every_stage_is_named():
    """One error lists the problems of all stages, unknown names and the seed."""
    with pytest.raises(ConfigError) as caught:
        preset(
            "balanced",
            {
                "": {"seed": -1, "sede": 3},
                "embed": {"steps": 1.5, "learning_rate": 0},
                "finetune": {"adapt": "(", "lora_rank": 1000},
                "sample": {"etas": (), "sheduler": "DDIM", "scheduler": "os.system('x')"},
            },
        )
    text = str(caught.value)
    for part in ("embed.steps", "embed.learning_rate", "finetune.adapt", "finetune.lora_rank", "sample.etas"):
        assert part in text
    assert "`sample.sheduler` is not a setting" in text and "`sede` is not a setting" in text and "`seed` is -1" in text
    assert caught.value.settings[:2] == ("embed.steps", "embed.learning_rate")
    assert all(", expected" in problem or "not a setting" in problem for problem in caught.value.problems)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["steps", "learning_rate", "draws", "adapt", "lora_rank", "lora_alpha", "anchor"]),
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers())),
    )
)
def test_any_values_give_a_config_or_a_config_error(values):
    """Any values give a valid config or a ConfigError, and no other error."""
    try:
        config = preset("balanced", {"finetune": values})
    except ConfigError:
        return
    assert isinstance(config.finetune.adapt, str) and 1 <= config.finetune.lora_rank <= 256


@pytest.mark.parametrize("etas", [(float("nan"),), (float("inf"),), ("1",), (True,), (9.0,)])
def test_etas_out_of_range(etas):
    """Etas that are not finite numbers within the range are refused."""
    with pytest.raises(ConfigError, match="etas"):
        SampleConfig(etas=etas)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(list(SampleConfig.__dataclass_fields__)),
        st.one_of(
            st.none(),
            st.booleans(),
            st.sampled_from([10**400, -(10**400), 2**63]),
            st.floats(),
            st.text(max_size=5),
            st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=2), st.none()), max_size=4),
        ),
    )
)
def test_any_sampling_values_give_a_config_or_a_config_error(values):
    """Any values, also numbers beyond any float, give valid settings of sampling or one error."""
    try:
        config = preset("balanced", {"sample": values}).sample
    except ConfigError as error:
        assert all(len(problem) < 300 for problem in error.problems)
        return
    assert 1 <= config.num_inference_steps <= 1000 and len(set(config.etas)) == len(config.etas) <= 256


@pytest.mark.parametrize("values", [{"etas": (0, 0.5, 0.0)}, {"seeds": (1, 2, 1)}])
def test_a_number_twice(values):
    """An eta or a seed given twice would be one picture under one name, so it is refused."""
    with pytest.raises(ConfigError, match="twice"):
        SampleConfig(**values)


def test_too_many_values():
    """More etas than an edit file can hold are refused before anything is trained."""
    with pytest.raises(ConfigError, match="257 values, expected 1 to 256"):
        SampleConfig(etas=tuple(number / 1000 for number in range(257)))


@pytest.mark.parametrize("strength", [-0.1, 2.1, float("nan"), True, "1", (1.0, 1.0), (1.0, 1.0, 3.0)])
def test_strength_out_of_range(strength):
    """A strength is one number from 0 to 2, or three of them."""
    with pytest.raises(ConfigError, match="strength"):
        SampleConfig(strength=strength)


@pytest.mark.parametrize("text", ["", "half", "down=", "left=1", "down=1,2", "down=0.5;up=1", "down=1=2", "up=1,up=0"])
def test_strength_that_cannot_be_read(text):
    """Words that are no strength, or name a block twice, are refused with both forms it may take."""
    with pytest.raises(ConfigError, match=r"0.8 or down=0.5,mid=1,up=1.2"):
        parse_strength(text)


@given(st.floats(0, 2), st.permutations(["down", "mid", "up"]), st.integers(0, 3))
def test_strength_of_blocks(factor, order, named):
    """Blocks may be named in any order; those left out keep strength 1; a plain number holds for all."""
    assert parse_strength(repr(factor)) == factor and strengths(factor) == (factor,) * 3
    text = ", ".join(f"{block}={factor!r}" for block in order[:named])
    if named:
        expected = tuple(factor if block in order[:named] else 1.0 for block in BLOCKS)
        assert parse_strength(text) == expected == strengths(expected)
        assert SampleConfig(strength=expected).strength == expected


def test_strength_of_blocks_survives_json():
    """A strength for each block comes back from plain values as it was."""
    config = preset("balanced", {"sample": {"strength": (0.5, 1.0, 1.5)}})
    assert EditConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "values",
    [
        {"timesteps": (0.5, 0.5)},
        {"timesteps": (0.9, 0.1)},
        {"timesteps": (0.0, 2.0)},
        {"timesteps": 0.5},
        {"anchor": 1.5},
        {"final_rate": -0.1},
        {"blocks": ()},
        {"blocks": ("left",)},
        {"blocks": "up"},
        {"keep": 0.0},
        {"average": 0.9},
        {"weight_decay": 1.0},
    ],
)
def test_training_settings_out_of_range(values):
    """Each setting of stage 2 is refused by its own name where it makes no sense."""
    with pytest.raises(ConfigError, match=f"finetune.{next(iter(values))}"):
        preset("balanced", {"finetune": values})


def test_etas_times_seeds_are_bounded():
    """A file cannot ask for more pictures than a person would wait for."""
    SampleConfig(etas=tuple(n / 100 for n in range(128)), seeds=tuple(range(8)))
    with pytest.raises(ConfigError, match="128 etas and 9 seeds, expected at most 1024"):
        SampleConfig(etas=tuple(n / 100 for n in range(128)), seeds=tuple(range(9)))


def test_settings_of_earlier_versions_are_read():
    """Plain values with settings that were dropped since give the config without them."""
    config = preset("balanced")
    values = config.to_dict()
    values["embed"] |= {"patience": 5, "average": 0.9}
    values["finetune"] |= {"weight_decay": 1.0, "embedding_learning_rate": 1e-3}
    values["sample"] |= {"ddim_eta": 0.5, "hold": 0.1, "release": 0.3}
    assert EditConfig.from_dict(json.loads(json.dumps(values))) == config
