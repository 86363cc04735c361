"""Facts about the three stages: trained tensors, edits in a pack, results of sampling, memory."""

import dataclasses
import gc
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import pytest
import torch
from conftest import PROMPTS
from PIL import Image
from torch import Tensor, nn

from lowmem_imagic.diffusion.schedules import DiscreteNoise, coarse, interpolate, loss_per_edit, project, refined
from lowmem_imagic.errors import DivergenceError
from lowmem_imagic.layers.adapter_pack import AdapterPack
from lowmem_imagic.pictures import Photo
from lowmem_imagic.pipeline.make import make_edits, stream_edits
from lowmem_imagic.pipeline.prepare import Job
from lowmem_imagic.sampling.sample import Cell
from lowmem_imagic.settings.stages import EditConfig, EmbedConfig, FinetuneConfig, SampleConfig, StageConfig
from lowmem_imagic.training import loop as training
from lowmem_imagic.training.adam import PackedAdam
from lowmem_imagic.training.loop import draw_rows
from lowmem_imagic.training.run import Run
from tests import calls
from tests.reference_stages import embed, finetune, train

SEEDS = (3, 4, 5)
EMBED = EmbedConfig(steps=3, learning_rate=1e-2, draws=2)
FINETUNE = FinetuneConfig(steps=3, learning_rate=1e-3, draws=2, lora_rank=2, lora_alpha=3.0)
SCHEDULERS = ("DDIM", "EulerDiscrete", "DPMSolverMultistep", "DDPM")


def latents_of(edits: Sequence[int] = (0, 1, 2)) -> Tensor:
    """Latents (N, 4, 8, 8) that stand for photos."""
    drawn = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(11))
    return drawn[list(edits)]


def generators(edits: Sequence[int] = (0, 1, 2)) -> list[torch.Generator]:
    """Each edit's own generator."""
    return [torch.Generator().manual_seed(SEEDS[edit]) for edit in edits]


@pytest.fixture
def first_steps(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Collects the gradients (N, P) of the first step of every training run."""
    seen: list[Tensor] = []

    class Recording(PackedAdam):
        def step(self, grads: Tensor, active: Tensor, share: float = 1.0) -> None:
            if not self.steps.any():
                seen.append(grads.clone())
            super().step(grads, active, share)

    monkeypatch.setattr(training, "PackedAdam", Recording)
    return seen


def trained(network: nn.Module) -> list[str]:
    """Names of the parameters that have a gradient or ask for one."""
    return [name for name, p in network.named_parameters() if p.requires_grad or p.grad is not None]


# Trained tensors


def test_embedding_stage_trains_the_embedding_only(base: Any, text: Tensor) -> None:
    """In stage 1 no parameter of the UNet has a gradient or asks for one, during or after; e_tgt stays as it was."""
    before = text.clone()
    during = []
    optimized, losses = embed(
        base, latents_of(), text, EMBED, generators(), lambda *_: during.extend(trained(calls.unet(base)))
    )
    assert not during and not trained(calls.unet(base))
    assert torch.equal(text, before) and not text.requires_grad
    assert not optimized.requires_grad and optimized.shape == text.shape
    assert all(not torch.equal(optimized[edit], text[edit]) for edit in range(3))
    assert losses.per_step.shape == (3, 3) and losses.steps_run == (3, 3, 3)


def test_finetuning_trains_the_adapters_only(base: Any, text: Tensor) -> None:
    """In stage 2 gradients exist on adapter factors only; e_opt and the UNet's own parameters get none."""
    before = text.clone()
    during: set[str] = set()
    pack, _ = finetune(
        base, latents_of(), text, FINETUNE, generators(), lambda *_: during.update(trained(calls.unet(base)))
    )
    assert len(during) == 2 * 79
    assert all(name.endswith((".down", ".up")) for name in during)
    assert not trained(calls.unet(base))
    assert torch.equal(text, before) and text.grad is None
    assert not any(p.requires_grad or p.grad is not None for p in pack.parameters)
    assert all(bool(pack.weights[edit].any()) for edit in range(3))


def test_the_base_is_bit_equal_after_both_stages(base: Any, text: Tensor) -> None:
    """Before and after training the UNet gives the same bits and holds the same tensors."""
    noisy, timesteps = latents_of(), torch.tensor([1, 500, 900])

    def predict() -> Tensor:
        with torch.no_grad():
            return calls.predict(base, noisy, timesteps, text)

    before = predict()
    state = {name: tensor.clone() for name, tensor in calls.unet(base).state_dict().items()}
    optimized, _ = embed(base, latents_of(), text, EMBED, generators())
    finetune(base, latents_of(), optimized, FINETUNE, generators())
    assert torch.equal(predict(), before)
    now = calls.unet(base).state_dict()
    assert list(now) == list(state) and all(torch.equal(now[name], tensor) for name, tensor in state.items())


def test_an_error_in_training_leaves_the_base(base: Any, text: Tensor) -> None:
    """A stage that is interrupted leaves the network it found."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    modules = list(calls.unet(base).modules())
    with pytest.raises(KeyboardInterrupt):
        finetune(base, latents_of(), text, FINETUNE, generators(), interrupt)
    assert all(a is b for a, b in zip(calls.unet(base).modules(), modules, strict=True))


def test_embeddings_of_any_memory_layout_are_trained(base: Any, text: Tensor) -> None:
    """A target embedding that does not lie row by row in memory is optimised like any other."""
    scattered = text.transpose(0, 2).contiguous().transpose(0, 2)
    assert not scattered.is_contiguous() and torch.equal(scattered, text)
    expected, _ = embed(base, latents_of(), text, EMBED, generators())
    optimized, _ = embed(base, latents_of(), scattered, EMBED, generators())
    assert torch.equal(optimized, expected)


@pytest.mark.parametrize("stage", ["embed", "finetune"])
def test_no_steps_train_nothing(base: Any, text: Tensor, stage: str) -> None:
    """A stage of 0 steps gives back e_tgt, or adapters that change nothing, and has no loss to report."""
    if stage == "embed":
        optimized, losses = embed(base, latents_of(), text, EmbedConfig(steps=0, learning_rate=1.0), generators())
        assert torch.equal(optimized, text)
    else:
        pack, losses = finetune(base, latents_of(), text, FinetuneConfig(steps=0, learning_rate=1.0), generators())
        assert not any(up.any() for up in pack.parameters[1::2])
    assert losses.steps_run == (0, 0, 0) and losses.tail(0) is None


# Edits in a pack


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_draws_of_a_pack_are_those_alone(base: Any, prediction_type: str) -> None:
    """Timesteps, noisy latents and targets of an edit have the same bits in a pack of 3 as alone, step after step."""
    schedule = DiscreteNoise(base.family.schedule.alpha_bar, prediction_type)
    together, alone = generators(), [generators([edit]) for edit in range(3)]
    for _ in range(3):
        pack = draw_rows(latents_of(), 4, schedule, together)
        for edit in range(3):
            own = draw_rows(
                latents_of([edit]), 4, DiscreteNoise(base.family.schedule.alpha_bar, prediction_type), alone[edit]
            )
            for part, expected in zip(pack, own, strict=True):
                assert torch.equal(part[4 * edit : 4 * edit + 4], expected)


def test_draws_are_the_documented_ones(base: Any) -> None:
    """Of an edit's generator the timesteps are drawn first, one in each part of the schedule, then the noise."""
    noisy, timesteps, target = draw_rows(latents_of([1]), 4, base.denoisers[0].schedule, generators([1]))
    generator = torch.Generator().manual_seed(SEEDS[1])
    parts = (torch.arange(4) + torch.rand(4, generator=generator)) / 4
    noise = torch.randn(4, 4, 8, 8, generator=generator)
    assert timesteps.tolist() == (parts * 1000).long().tolist()
    assert torch.equal(target, noise)
    scheduler = base.family.schedule.scheduler("DDPM")
    torch.testing.assert_close(noisy, scheduler.add_noise(latents_of([1] * 4), noise, timesteps))


@pytest.mark.parametrize(
    ("stage", "checkpointing"),
    [("embed", False), ("finetune", False), ("finetune", True)],
    ids=["embed", "finetune", "finetune-checkpointed"],
)
def test_a_pack_trains_each_edit_as_alone(
    stage: str,
    checkpointing: bool,
    load_base: Callable[..., Any],
    text: Tensor,
    first_steps: list[Tensor],
    relative: Callable[..., float],
) -> None:
    """First losses and gradients of each edit of a pack of 3 are those alone, and its results stay close."""
    base = load_base(checkpointing=checkpointing)

    def run(edits: Sequence[int]) -> tuple[Tensor, Any]:
        arguments = (base, latents_of(edits), text[list(edits)])
        if stage == "embed":
            return embed(*arguments, EMBED, generators(edits))
        pack, losses = finetune(*arguments, FINETUNE, generators(edits))
        return pack.weights, losses

    results, losses = run((0, 1, 2))
    for edit in range(3):
        result, own = run((edit,))
        assert relative(losses.per_step[0, edit], own.per_step[0, 0]) < 1e-5
        assert relative(first_steps[0][edit], first_steps[1 + edit][0]) < 1e-5
        assert relative(losses.per_step[:, edit], own.per_step[:, 0]) < 1e-3
        assert relative(results[edit], result[0]) < 1e-3


def test_a_broken_edit_is_reported_and_stays_alone(
    base: Any, text: Tensor, first_steps: list[Tensor], relative: Callable[..., float]
) -> None:
    """A loss that is not a number ends training with an error; the gradients of the other edits are untouched."""
    latents = latents_of()
    finetune(base, latents, text, FINETUNE, generators())
    modules = list(calls.unet(base).modules())
    latents[1] = torch.nan
    with pytest.raises(DivergenceError, match=r"after 1 of 3 steps.*lower the learning rate"):
        finetune(base, latents, text, FINETUNE, generators())
    expected, broken = first_steps
    assert broken[1].isnan().any()
    for edit in (0, 2):
        assert relative(broken[edit], expected[edit]) < 1e-5
    assert all(a is b for a, b in zip(calls.unet(base).modules(), modules, strict=True))


def test_the_same_seed_gives_the_same_bytes(load_base: Callable[..., Any]) -> None:
    """Two runs from the same seeds give e_opt, adapters and sampled latents that agree bit for bit."""

    def run() -> list[bytes]:
        base = load_base()
        text = calls.encode_text(base, PROMPTS)
        edits = generators()
        optimized, _ = embed(base, latents_of(), text, EMBED, edits)
        pack, _ = finetune(base, latents_of(), optimized, FINETUNE, edits)
        cells = [Cell(edit=edit, eta=0.7, seed=1) for edit in range(3)]
        images = calls.sample(base, pack, text, optimized, cells, SampleConfig(num_inference_steps=3))
        return [tensor.numpy().tobytes() for tensor in (optimized, pack.weights, images)]

    assert run() == run()


def test_another_seed_gives_another_edit(base: Any, text: Tensor) -> None:
    """The seed of an edit changes its result."""
    one, _ = embed(base, latents_of([0]), text[:1], EMBED, generators([0]))
    other, _ = embed(base, latents_of([0]), text[:1], EMBED, generators([1]))
    assert not torch.equal(one, other)


# Training


def test_each_stage_lowers_the_loss(base: Any, text: Tensor) -> None:
    """On draws that training did not see, e_opt has a lower loss than e_tgt, and the adapters a lower one still."""

    def evaluate(embeddings: Tensor) -> Tensor:
        noisy, timesteps, target = draw_rows(
            latents_of(), 16, base.denoisers[0].schedule, [torch.Generator().manual_seed(99)] * 3
        )
        with torch.no_grad():
            return loss_per_edit(calls.predict(base, noisy, timesteps, embeddings.repeat_interleave(16, 0)), target, 3)

    optimized, _ = embed(base, latents_of(), text, EmbedConfig(steps=8, learning_rate=0.05, draws=2), generators())
    config = FinetuneConfig(steps=8, learning_rate=0.02, draws=2, lora_rank=2, lora_alpha=2.0)
    pack, losses = finetune(base, latents_of(), optimized, config, generators())
    before, embedded = evaluate(text), evaluate(optimized)
    pack.set_rows(None)
    with pack.attached(calls.unet(base)):
        tuned = evaluate(optimized)
    assert (embedded < 0.995 * before).all()
    assert (tuned < 0.9 * embedded).all()
    assert all(losses.tail(edit) < losses.per_step[0, edit] for edit in range(3))


class Stub:
    """A base whose prediction is ``mean(conditioning) * noisy``: almost pure noise in."""

    denoisers = (
        types.SimpleNamespace(
            name="stub",
            schedule=DiscreteNoise(torch.full((1000,), 1e-6), "epsilon"),
            extra={},
            drawn=lambda extra, *_, **__: extra,
        ),
    )
    device = torch.device("cpu")
    most_rows, replays, dtype = None, False, torch.float32

    def predict(self, denoiser: Any, latents: Tensor, timesteps: Tensor, given: Any) -> Tensor:
        return given["embeds"].mean((1, 2)).view(-1, 1, 1, 1) * latents


def run_stub(gains: Sequence[float], config: StageConfig) -> tuple[Any, Tensor, list[Tensor]]:
    """Losses, final weights and the weights after each step of a training run on `Stub`.

    The conditioning of edit `i` is its weights times ``gains[i]``.
    """
    edits = len(gains)
    weights = torch.zeros(edits, 6, requires_grad=True)
    weights.grad = torch.zeros_like(weights)
    after_step: list[Tensor] = []
    losses = train(
        Stub(),
        torch.zeros(edits, 4, 8, 8),
        lambda: torch.tensor(gains).view(-1, 1, 1) * weights.view(edits, 2, 3),
        training.TrainedTensor(weights.detach(), weights.grad, config.learning_rate),
        config,
        [torch.Generator().manual_seed(edit) for edit in range(edits)],
        progress=lambda *_: after_step.append(weights.detach().clone()),
    )
    return losses, weights.detach(), after_step


def test_draws_come_from_their_part_of_the_schedule(base: Any) -> None:
    """Timesteps stay within the configured part, one in each of its equal parts; the noise is that of the whole."""
    _, timesteps, noise = draw_rows(latents_of([1]), 4, base.denoisers[0].schedule, generators([1]), (0.5, 0.9))
    _, anywhere, same = draw_rows(latents_of([1]), 4, base.denoisers[0].schedule, generators([1]))
    assert [int((t - 500) // 100) for t in timesteps] == [0, 1, 2, 3]
    assert torch.equal(noise, same) and not torch.equal(timesteps, anywhere)


def test_anchored_draws_have_the_starting_noise(base: Any) -> None:
    """Exactly as many draws of each edit as asked for have the anchor's noise; the timesteps are those of any step."""
    anchor = torch.randn(4, 8, 8)
    plain = draw_rows(latents_of([0, 1]), 4, base.denoisers[0].schedule, generators([0, 1]))
    some = draw_rows(latents_of([0, 1]), 4, base.denoisers[0].schedule, generators([0, 1]), anchor=anchor, anchored=3)
    assert torch.equal(plain[1], some[1])
    is_anchor = [torch.equal(noise, anchor) for noise in some[2]]
    assert sum(is_anchor[:4]) == sum(is_anchor[4:]) == 3
    assert all(torch.equal(some[2][row], plain[2][row]) for row in range(8) if not is_anchor[row])


@pytest.mark.parametrize(("draws", "share"), [(1, 0.5), (2, 0.5), (3, 0.5), (1, 0.3), (5, 0.3), (4, 1.0), (2, 0.0)])
def test_the_share_of_anchored_draws_is_kept_over_the_steps(base: Any, draws: int, share: float) -> None:
    """A share that is no whole number of draws of a step is one of the draws of all steps."""
    config = FinetuneConfig(steps=20, draws=draws, anchor=share, learning_rate=1e-3, lora_rank=4, lora_alpha=4.0)
    run, counts = Run(base.denoisers[0], latents_of([0])[0], config, *generators([0])), []
    for _ in range(config.steps):
        counts.append(run.anchored)
        run.losses.append(1.0)
    assert sum(counts) == round(20 * draws * share) and max(counts) - min(counts) <= 1


def test_anchored_training_learns_the_way_from_the_starting_noise(base: Any, text: Tensor) -> None:
    """An edit trained on the starting noise alone predicts it better than an edit trained on any noise."""
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    config = FinetuneConfig(steps=20, learning_rate=5e-3, draws=2, lora_rank=4, lora_alpha=4.0)
    photo, words = latents_of([0]), text[:1]

    def error(share: float) -> float:
        tuned = dataclasses.replace(config, anchor=share)
        pack, *_ = finetune(base, photo, words, tuned, generators([0]), start_noise=noise[None])
        noisy, timesteps, target = draw_rows(
            photo, 8, base.denoisers[0].schedule, generators([1]), anchor=noise, anchored=8
        )
        with torch.no_grad(), pack.attached(calls.unet(base)):
            return float((calls.predict(base, noisy, timesteps, words.repeat(8, 1, 1)) - target).square().mean())

    assert error(1.0) < 0.9 * error(0.0)


def test_the_rate_falls_evenly_to_its_share() -> None:
    """With constant gradients Adam's step is the rate: from the whole at first to the configured share."""
    weights, grads = torch.zeros(1, 3), torch.ones(1, 3)
    optimizer = PackedAdam(weights, learning_rate=0.1)
    for share in (1.0, 0.5):
        before = weights.clone()
        optimizer.step(grads, torch.tensor([True]), share)
        torch.testing.assert_close(before - weights, torch.full((1, 3), 0.1 * share), rtol=1e-4, atol=0)
    _, _, after_step = run_stub([1.0], StageConfig(steps=5, learning_rate=1e-3, draws=2, final_rate=0.2))
    moves = torch.stack([torch.zeros(1, 6), *after_step]).diff(dim=0).abs().mean((1, 2))
    torch.testing.assert_close(moves, 1e-3 * torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2]), rtol=0.02, atol=0)


def test_adapters_may_be_the_decoders_only(base: Any, text: Tensor) -> None:
    """Blocks left out of the settings get no adapters, all layers of the others do."""
    some = dataclasses.replace(FINETUNE, blocks=("up",))
    pack, _ = finetune(base, latents_of(), text, some, generators())
    whole, _ = finetune(base, latents_of(), text, FINETUNE, generators())
    expected = {key for key in whole.export(0) if key.startswith("lora_unet_up_blocks")}
    assert set(pack.export(0)) == expected and 0 < len(expected) < len(whole.export(0))


# Sampling


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_sampling_is_the_loop_written_out(
    scheduler: str,
    guidance_scale: float,
    base: Any,
    text: Tensor,
    edits: tuple[AdapterPack, Tensor],
    relative: Callable[..., float],
) -> None:
    """Latents equal a loop by hand over diffusers' scheduler with guidance, from the same noise and embedding."""
    pack, optimized = edits
    config = SampleConfig(num_inference_steps=5, guidance_scale=guidance_scale, scheduler=scheduler)
    result = calls.sample(base, pack, text, optimized, [Cell(edit=1, eta=0.6, seed=8)], config)

    steps = getattr(diffusers, f"{scheduler}Scheduler").from_config(base.family.scheduler_config)
    steps.set_timesteps(5)
    generator = torch.Generator().manual_seed(8)
    latents = torch.randn(1, 4, 8, 8, generator=generator) * steps.init_noise_sigma
    extra = {"eta": 0.0} if scheduler == "DDIM" else {}
    if scheduler == "DDPM":
        extra = {"generator": generator}
    embedding = 0.6 * text[1:2] + 0.4 * optimized[1:2]
    unconditional = calls.encode_text(base, [""])
    pack.set_rows(torch.tensor([1]))
    with torch.no_grad(), pack.attached(calls.unet(base)):
        for t in steps.timesteps:
            x = steps.scale_model_input(latents, t)
            prediction = calls.unet(base)(x, t, encoder_hidden_states=embedding).sample
            if guidance_scale != 1:
                without = calls.unet(base)(x, t, encoder_hidden_states=unconditional).sample
                prediction = without + guidance_scale * (prediction - without)
            latents = steps.step(prediction, t, latents, **extra).prev_sample
    assert relative(result, latents) < 1e-5


@pytest.mark.parametrize("photo_guidance", [1.0, 2.5])
@pytest.mark.parametrize("eta", [-0.5, 0.6])
def test_a_source_prompt_adds_what_the_sentence_says_otherwise(
    eta: float,
    photo_guidance: float,
    base: Any,
    text: Tensor,
    edits: tuple[AdapterPack, Tensor],
    relative: Callable[..., float],
) -> None:
    """With a source prompt, latents equal a loop by hand over the photo's prediction, under e_opt with the adapter and
    with its own guidance, plus the difference of sentence and source prompt without the adapter, times eta, up to 1.5
    times the way to the sentence's prediction."""
    pack, optimized = edits
    config = SampleConfig(
        num_inference_steps=5, photo_guidance=photo_guidance, source_prompt="a red cube", edit_guidance_scale=3.0
    )
    cell = Cell(edit=1, eta=eta, seed=8, strength=0.7)
    result = calls.sample(base, pack, text, optimized, [cell], config)

    steps = diffusers.DDIMScheduler.from_config(base.family.scheduler_config)
    steps.set_timesteps(5)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(8))
    empty, source = calls.encode_text(base, ["", "a red cube"]).split(1)

    def predicted(embedding: Tensor, strength: float) -> Tensor:
        pack.set_rows(torch.tensor([1]), torch.full((1, 3), strength))
        with torch.no_grad(), pack.attached(calls.unet(base)):
            return calls.unet(base)(latents, t, encoder_hidden_states=embedding).sample

    for t in steps.timesteps:
        without = predicted(empty, 0.7)
        photo = without + photo_guidance * (predicted(optimized[1:2], 0.7) - without)
        sentence = predicted(text[1:2], 0.0)
        furthest = 1.5 * (sentence - photo).abs()
        prediction = (photo + 3.0 * eta * (sentence - predicted(source, 0.0))).clamp(photo - furthest, photo + furthest)
        latents = steps.step(prediction, t, latents).prev_sample
    assert relative(result, latents) < 1e-5


def test_with_a_source_prompt_eta_0_is_still_the_photo(
    base: Any, text: Tensor, edits: tuple[AdapterPack, Tensor]
) -> None:
    """A source prompt leaves the picture at eta 0 and that of the base alone as they are, and one equal to the sentence
    leaves every eta at the photo."""
    pack, optimized = edits

    def render(eta: float, target: Tensor = text, **settings: Any) -> Tensor:
        config = SampleConfig(num_inference_steps=2, photo_guidance=1.0, **settings)
        return calls.sample(base, pack, target, optimized, [Cell(edit=0, eta=eta, seed=0)], config)

    def alone(**settings: Any) -> Tensor:
        config = SampleConfig(num_inference_steps=2, photo_guidance=1.0, **settings)
        return calls.sample(base, pack, text, optimized, [Cell(edit=0, eta=1.0, seed=0, strength=0.0)], config)

    photo, same = render(0.0), calls.encode_text(base, ["a red cube"] * len(text))
    assert torch.equal(render(0.0, source_prompt="a red cube"), photo)
    assert torch.equal(alone(source_prompt="a red cube"), alone())
    torch.testing.assert_close(render(1.0, same, source_prompt="a red cube"), photo)
    assert not torch.allclose(render(1.0, source_prompt="a red cube"), photo)


def test_the_difference_to_a_source_prompt_counts_as_guidance(
    base: Any, text: Tensor, edits: tuple[AdapterPack, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sampler is told that predictions are exaggerated, as DeepFloyd IF's thresholds need, for those pictures alone
    that have guidance or a source prompt; and an image has as many rows as the settings say."""
    pack, optimized = edits
    told, rows = list[bool](), list[int]()
    schedule, predict = base.denoisers[0].schedule, calls.plain(base)
    sampler = schedule.sampler
    monkeypatch.setattr(
        schedule, "sampler", lambda *a, guided, **k: told.append(guided) or sampler(*a, guided=guided, **k)
    )
    monkeypatch.setattr(base, "predict", calls.in_place(lambda x, t, e: rows.append(len(x)) or predict(x, t, e)))
    for settings, expected in (
        ({"photo_guidance": 1.0}, (False, 1)),
        ({"photo_guidance": 1.0, "source_prompt": "a red cube"}, (True, 3)),
        ({"source_prompt": "a red cube"}, (True, 4)),
        ({"guidance_scale": 1.0}, (False, 1)),
    ):
        config = SampleConfig(num_inference_steps=1, **settings)
        eta = 1.0 if config.source_prompt else 0.0
        calls.sample(base, pack, text, optimized, [Cell(edit=0, eta=eta, seed=0)], config)
        assert (told.pop(), rows.pop()) == expected and not rows
        assert config.image_rows == (2 if settings == {"photo_guidance": 1.0} else expected[1])


CELLS = [
    Cell(edit=2, eta=0.0, seed=0),
    Cell(edit=0, eta=1.0, seed=1, guidance_scale=1.0),
    Cell(edit=2, eta=0.7, seed=1, strength=0.5),
    Cell(edit=1, eta=0.7, seed=0, strength=(0.0, 1.0, 2.0)),
    Cell(edit=0, eta=0.5, seed=0, guidance_scale=5.0),
]


@pytest.mark.parametrize(("scheduler", "source"), [*((name, "") for name in SCHEDULERS), (SCHEDULERS[0], "a red cube")])
def test_an_image_does_not_depend_on_its_batch(
    scheduler: str,
    source: str,
    base: Any,
    text: Tensor,
    edits: tuple[AdapterPack, Tensor],
    relative: Callable[..., float],
) -> None:
    """An image is the same rendered alone, with all others at once, and in batches of 1 and 5 rows.

    This holds for any edits, etas, seeds, strengths and guidance of the others, and with a source prompt.
    """
    pack, optimized = edits

    def render(cells: Sequence[Cell], batch_rows: int) -> Tensor:
        config = SampleConfig(
            num_inference_steps=3, scheduler=scheduler, batch_rows=batch_rows, start="photo", source_prompt=source
        )
        return calls.sample(base, pack, text, optimized, cells, config, coarse_latents=coarse(latents_of(), 4))

    together = render(CELLS, 64)
    for batch_rows in (1, 5):
        assert relative(render(CELLS, batch_rows), together) < 1e-4
    for number, cell in enumerate(CELLS):
        assert relative(render([cell], 64)[0], together[number]) < 1e-4
    assert min(relative(a, b) for i, a in enumerate(together) for b in together[:i]) > 1e-2


def test_a_cells_own_guidance_is_the_configurations(base: Any, text: Tensor, edits: tuple[AdapterPack, Tensor]) -> None:
    """Guidance and strength of a cell do what the configuration's guidance, and an adapter scaled, would do."""
    pack, optimized = edits
    own = calls.sample(
        base,
        pack,
        text,
        optimized,
        [Cell(edit=1, eta=0.5, seed=0, guidance_scale=6.0, strength=0.5)],
        SampleConfig(num_inference_steps=2),
    )
    scaled = [{key: (d, 0.5 * u, alpha) for key, (d, u, alpha) in pack.export(edit).items()} for edit in range(3)]
    config = SampleConfig(num_inference_steps=2, guidance_scale=6.0)
    halved = AdapterPack.load(calls.unet(base), calls.NAMES, scaled)
    expected = calls.sample(base, halved, text, optimized, [Cell(edit=1, eta=0.5, seed=0)], config)
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_starting_from_the_photo_carries_its_low_frequencies(
    scheduler: str, base: Any, text: Tensor, edits: tuple[AdapterPack, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first latents the UNet sees are diffusers' `add_noise` of the photo's cell means; without those, an error."""
    pack, optimized = edits
    seen: list[Tensor] = []
    predict = calls.plain(base)
    monkeypatch.setattr(base, "predict", calls.in_place(lambda x, t, e: seen.append(x.clone()) or predict(x, t, e)))
    config = SampleConfig(num_inference_steps=1, guidance_scale=1.0, scheduler=scheduler, start="photo")
    cells = [Cell(edit=2, eta=0.5, seed=5)]
    low = coarse(latents_of(), 4)
    calls.sample(base, pack, text, optimized, cells, config, coarse_latents=low)
    steps = base.family.schedule.scheduler(scheduler)
    steps.set_timesteps(1)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    expected = steps.add_noise(refined(low[2:], 8, 8), noise, steps.timesteps[:1])
    torch.testing.assert_close(seen[0], steps.scale_model_input(expected, steps.timesteps[0]))
    with pytest.raises(ValueError, match="coarse latents"):
        calls.sample(base, pack, text, optimized, cells, config)


def test_projection_is_another_way(base: Any, text: Tensor, edits: tuple[AdapterPack, Tensor]) -> None:
    """With projection, sampling is conditioned on the projected embedding: the linear one at eta 0, another at 1."""
    pack, optimized = edits

    def render(interpolation: str, eta: float, target: Tensor = text) -> Tensor:
        config = SampleConfig(num_inference_steps=2, interpolation=interpolation)
        return calls.sample(base, pack, target, optimized, [Cell(edit=0, eta=eta, seed=0)], config)

    assert torch.equal(render("linear", 0.0), render("projection", 0.0))
    torch.testing.assert_close(render("projection", 0.8), render("linear", 1.0, project(text, optimized, 0.8)))
    assert not torch.allclose(render("linear", 0.8), render("projection", 0.8))


def test_eta_ends_at_the_embeddings(base: Any, text: Tensor, edits: tuple[AdapterPack, Tensor]) -> None:
    """At eta 0 the target embedding plays no part, at eta 1 the optimised one plays none."""
    pack, optimized = edits
    config, cells = SampleConfig(num_inference_steps=2), [[Cell(edit=0, eta=eta, seed=0)] for eta in (0.0, 1.0)]
    photo = calls.sample(base, pack, text, optimized, cells[0], config)
    target = calls.sample(base, pack, text, optimized, cells[1], config)
    assert torch.equal(calls.sample(base, pack, text + 1, optimized, cells[0], config), photo)
    assert torch.equal(calls.sample(base, pack, text, optimized + 1, cells[1], config), target)
    assert not torch.equal(photo, target)


@pytest.mark.parametrize(("guidance_scale", "rows"), [(1.0, 3), (3.0, 6)])
def test_guidance_one_runs_no_unconditional_rows(
    guidance_scale: float,
    rows: int,
    base: Any,
    text: Tensor,
    edits: tuple[AdapterPack, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At guidance scale 1 a step runs one row an image, at any other two: one with the negative prompt."""
    pack, optimized = edits
    seen = []
    predict = calls.plain(base)

    def counting(latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        seen.append((len(latents), len(timesteps), embeddings))
        return predict(latents, timesteps, embeddings)

    monkeypatch.setattr(base, "predict", calls.in_place(counting))
    cells = [Cell(edit=edit, eta=0.5, seed=0) for edit in range(3)]
    config = SampleConfig(num_inference_steps=2, guidance_scale=guidance_scale, negative_prompt="a blue sphere")
    calls.sample(base, pack, text, optimized, cells, config)
    assert [(x, t) for x, t, _ in seen] == [(rows, rows)] * 2
    expected = interpolate(text, optimized, 0.5)
    if rows == 6:
        expected = torch.cat([calls.encode_text(base, ["a blue sphere"] * 3), expected])
    assert torch.equal(seen[0][2], expected)


@pytest.mark.parametrize(
    ("settings", "rows", "done"),
    [
        ({}, [4, 4, 4, 4, 2, 2], [2, 4, 6, 8, 9, 10]),
        ({"source_prompt": "a red cube", "photo_guidance": 1.0}, [3] * 10, range(1, 11)),
    ],
)
def test_no_batch_exceeds_the_limit(
    settings: dict[str, Any],
    rows: list[int],
    done: Sequence[int],
    base: Any,
    text: Tensor,
    edits: tuple[AdapterPack, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A batch has at most `batch_rows` rows, those of guidance and of a source prompt included; reported are the steps
    of all images so far."""
    pack, optimized = edits
    seen, reports = [], []
    predict = calls.plain(base)
    monkeypatch.setattr(base, "predict", calls.in_place(lambda x, t, e: seen.append(len(x)) or predict(x, t, e)))
    config = SampleConfig(num_inference_steps=2, batch_rows=5, **settings)
    cells = [Cell(edit=0, eta=0.5, seed=seed) for seed in range(5)]
    calls.sample(base, pack, text, optimized, cells, config, lambda *report: reports.append(report[:2]))
    assert seen == rows
    assert reports == [(steps, 10) for steps in done]


def test_sampling_restores_the_base(base: Any, text: Tensor, edits: tuple[AdapterPack, Tensor]) -> None:
    """After sampling, also after an interrupted one, the UNet is the network it was."""
    pack, optimized = edits

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    modules = list(calls.unet(base).modules())
    config = SampleConfig(num_inference_steps=1)
    calls.sample(base, pack, text, optimized, CELLS[:1], config)
    with pytest.raises(KeyboardInterrupt):
        calls.sample(base, pack, text, optimized, CELLS[:1], config, interrupt)
    assert all(a is b for a, b in zip(calls.unet(base).modules(), modules, strict=True))


# Memory


class Parts:
    """Weak references to every part a family hands out, and which were alive when the UNet was asked for."""

    def __init__(self, family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaded: list[tuple[str, weakref.ref[nn.Module]]] = []
        self.alive_at_unet: list[str] = []
        for name in ("load_text_encoder", "load_codec", "load_unet"):
            monkeypatch.setattr(family, name, self._watched(name.removeprefix("load_"), getattr(family, name)))

    def _watched(self, name: str, load: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def watched(*names: str, **options: Any) -> nn.Module:
            if name == "unet":
                self.alive_at_unet += self.alive()
            part = load(*names, **options)
            self.loaded.append((name, weakref.ref(part)))
            return part

        return watched

    def alive(self) -> list[str]:
        """Names of the parts that are alive, after a garbage collection."""
        gc.collect()
        return [name for name, ref in self.loaded if ref() is not None]


def test_text_encoder_and_vae_die_after_use(load_base: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Text encoder and VAE are dead once encoding or decoding is done; the UNet lives until it is released."""
    base = load_base()
    parts = Parts(base.family, monkeypatch)
    calls.encode_text(base, PROMPTS)
    assert parts.alive() == []
    encoded = base.encode_images(torch.rand(2, 3, 16, 16) * 2 - 1)
    assert parts.alive() == []
    base.decode(encoded)
    assert parts.alive() == []
    calls.predict(base, encoded, torch.tensor([1, 2]), calls.encode_text(base, PROMPTS[:2]))
    assert parts.alive() == ["unet"]
    base.release()
    assert parts.alive() == []
    assert [name for name, _ in parts.loaded] == ["text_encoder", "codec", "codec", "unet"]


def test_encoders_die_even_when_encoding_fails(load_base: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while encoding leaves neither text encoder nor VAE behind."""
    base = load_base()
    parts = Parts(base.family, monkeypatch)
    with pytest.raises(RuntimeError):
        base.encode_images(torch.zeros(1, 7, 16, 16))
    assert parts.loaded and parts.alive() == []


def test_a_pack_is_encoded_before_the_unet_is_loaded(
    load_base: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making edits loads text encoder and VAE once each, for all photos, and both are dead when the UNet comes."""
    base = load_base()
    parts = Parts(base.family, monkeypatch)
    photos = [
        Photo(image=Image.new("RGB", size, color), sha256="0" * 64, name="photo", notes=(), icc_profile=None)
        for size, color in (((20, 12), "red"), ((9, 16), "green"))
    ]
    jobs = [Job(photo, prompt) for photo, prompt in zip(photos, PROMPTS, strict=False)]
    edits = make_edits(base, jobs, EditConfig(embed=EMBED, finetune=FINETUNE))
    assert len(edits) == 2
    assert sorted(name for name, _ in parts.loaded if name != "unet") == ["codec", "text_encoder"]
    assert parts.alive_at_unet == []
    assert parts.alive() == ["unet"]


def test_edits_are_handed_over_as_they_finish(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of a pack of one slot come one by one, each the edit `make_edits` gives; a broken one comes as its error."""
    jobs = [
        Job(Photo(image=Image.new("RGB", (16, 16), color), sha256="0" * 64, name="p", notes=(), icc_profile=None), p)
        for color, p in zip(("red", "green", "blue"), PROMPTS, strict=True)
    ]
    config = EditConfig(embed=EMBED, finetune=FINETUNE)
    expected = make_edits(base, jobs, config, slots=1)
    groups = list(stream_edits(base, jobs, config, slots=1))
    assert [[number for number, _ in group] for group in groups] == [[0], [1], [2]]
    for [(number, edit)] in groups:
        assert torch.equal(edit.conditioning["embeds"], expected[number].conditioning["embeds"])
        assert all(
            torch.equal(edit.adapters["unet"][key].up, f.up) for key, f in expected[number].adapters["unet"].items()
        )
        assert set(edit.measured["stages"]) == {"encode", "load", "embed", "finetune"}
    assert make_edits(base, [], config) == []
    encode = base.encode
    broken = torch.tensor([1.0, torch.nan, 1.0]).view(3, 1, 1, 1)
    monkeypatch.setattr(base, "encode", lambda images: {"unet": encode(images)["unet"] * broken})
    made = {number: edit for group in stream_edits(base, jobs, config, slots=2) for number, edit in group}
    assert isinstance(made[1], DivergenceError)
    assert all(made[number].target_prompt == PROMPTS[number] for number in (0, 2))
    with pytest.raises(DivergenceError, match="lower the learning rate"):
        make_edits(base, jobs, config)
