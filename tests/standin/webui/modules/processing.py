"""One request from its fields to images, in the order in which the host calls scripts and extra networks."""

import json
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from modules import extra_networks, infotext_utils, sd_models, sd_samplers_common, shared
from modules.images import save_image

EDIT = re.compile(r"\[([^:\[\]]*):([^:\[\]]*):([\d.]+)\]")
SAVED = (
    "prompt",
    "negative_prompt",
    "seed",
    "steps",
    "sampler_name",
    "cfg_scale",
    "width",
    "height",
    "denoising_strength",
)
DEFAULTS = {
    "prompt": "", "negative_prompt": "", "steps": 20, "width": 512, "height": 512, "seed": -1,
    "sampler_name": "Euler a", "scheduler": None,
    "cfg_scale": 7.0, "n_iter": 1, "batch_size": 1, "denoising_strength": 0.75, "enable_hr": False,
    "hr_scale": 2.0, "hr_upscaler": None,
    "hr_second_pass_steps": 0, "init_images": None, "refiner_checkpoint": None, "refiner_switch_at": 0.8,
    "override_settings": None,
    "s_min_uncond": None, "disable_extra_networks": False, "hr_checkpoint_name": None, "hr_prompt": "",
    "override_settings_restore_afterwards": True,
}  # fmt: skip


class StableDiffusionProcessing:
    cached_uc = [None, None]  # noqa: RUF012 shared by all, as the host's
    cached_c = [None, None]  # noqa: RUF012

    def __init__(self, **fields):
        self.__dict__.update({**DEFAULTS, **fields})
        self.override_settings = dict(self.override_settings or {})
        self.extra_generation_params, self.comments = {}, {}
        self.script_args, self.scripts, self.sampler = [], None, None
        self.is_hr_pass = False
        self.iteration = 0
        self.refiner_checkpoint_info = None

    @property
    def sd_model(self):
        return shared.sd_model

    def comment(self, text):
        self.comments[text] = 1

    def init(self, all_prompts, all_seeds, all_subseeds):
        pass

    def parse_extra_network_prompts(self):
        self.prompts, self.extra_network_data = extra_networks.parse_prompts(self.prompts)

    def cached_params(
        self, required_prompts, steps, extra_network_data, hires_steps=None, use_old_scheduling=False
    ):
        return (
            required_prompts, steps, hires_steps, use_old_scheduling, shared.opts.CLIP_stop_at_last_layers,
            shared.sd_model.sd_checkpoint_info,
            extra_network_data, self.width, self.height, shared.opts.fp8_storage,
            shared.opts.cache_fp16_weight,
        )  # fmt: skip

    def get_conds_with_caching(
        self, function, required_prompts, steps, caches, extra_network_data, hires_steps=None
    ):
        params = self.cached_params(required_prompts, steps, extra_network_data, hires_steps, False)
        for cache in caches:
            if cache[0] is not None and cache[0] == params:
                return cache[1]
        caches[0][1] = function(required_prompts, steps)
        caches[0][0] = params
        return caches[0][1]

    def setup_conds(self):
        steps = sd_samplers_common.ALL[self.sampler_name].total_steps(self.steps)
        self.uc = self.get_conds_with_caching(
            learned, self.negative_prompts[:1], steps, [self.cached_uc], self.extra_network_data
        )[0]
        self.c = self.get_conds_with_caching(
            multicond, self.prompts[:1], steps, [self.cached_c], self.extra_network_data
        )

    def rng(self, shape=None):
        """Noise for the whole batch, with one generator for each image."""
        if shape:
            self.noise_shape, self.generators = (
                shape,
                [torch.Generator().manual_seed(seed) for seed in self.seeds],
            )
        return torch.stack(
            [torch.randn(self.noise_shape, generator=generator) for generator in self.generators]
        )

    def latent_shape(self, scale=1):
        return [4, int(self.height * scale) // 8, int(self.width * scale) // 8]

    def size(self):
        return self.width, self.height


class StableDiffusionProcessingTxt2Img(StableDiffusionProcessing):
    cached_hr_uc = [None, None]  # noqa: RUF012
    cached_hr_c = [None, None]  # noqa: RUF012
    hr_checkpoint_info = None

    def init(self, all_prompts, all_seeds, all_subseeds):
        if self.enable_hr and self.hr_checkpoint_name and self.hr_checkpoint_name != "Use same checkpoint":
            self.hr_checkpoint_info = sd_models.get_closet_checkpoint_match(self.hr_checkpoint_name)
            if self.hr_checkpoint_info is None:
                raise RuntimeError(f"Could not find checkpoint with name {self.hr_checkpoint_name}")
            self.extra_generation_params["Hires checkpoint"] = self.hr_checkpoint_info.short_title

    def parse_extra_network_prompts(self):
        prompts = [self.hr_prompt] * len(self.prompts) if self.hr_prompt else self.prompts
        super().parse_extra_network_prompts()
        if self.enable_hr:
            self.hr_prompts, self.hr_extra_network_data = extra_networks.parse_prompts(prompts)

    def setup_conds(self):
        if self.is_hr_pass:
            self.calculate_hr_conds()
        else:
            super().setup_conds()

    def calculate_hr_conds(self):
        steps = self.hr_second_pass_steps or self.steps
        own = (self.hr_extra_network_data, steps)
        self.uc = self.get_conds_with_caching(
            learned, self.negative_prompts[:1], steps, [self.cached_hr_uc, self.cached_uc], *own
        )[0]
        self.c = self.get_conds_with_caching(
            multicond, self.hr_prompts[:1], steps, [self.cached_hr_c, self.cached_c], *own
        )

    def size(self):
        return (
            (int(self.width * self.hr_scale), int(self.height * self.hr_scale))
            if self.enable_hr
            else (self.width, self.height)
        )

    def sample(self, conditioning, unconditional_conditioning, seeds, subseeds, subseed_strength, prompts):
        self.sampler = sd_samplers_common.Sampler(sd_samplers_common.ALL[self.sampler_name])
        x = self.rng(self.latent_shape())
        self.scripts.process_before_every_sampling(
            self, x=x, noise=x, c=conditioning, uc=unconditional_conditioning
        )
        samples = self.sampler.sample(self, x)
        if not self.enable_hr:
            return samples
        sd_models.reload_model_weights(self.hr_checkpoint_info)
        if shared.state.interrupted:
            return samples
        self.is_hr_pass = True
        self.sampler = sd_samplers_common.Sampler(sd_samplers_common.ALL[self.sampler_name])
        samples = torch.nn.functional.interpolate(
            samples, size=self.latent_shape(self.hr_scale)[1:], mode="nearest"
        )
        noise = self.rng(self.latent_shape(self.hr_scale))
        if not self.disable_extra_networks:
            extra_networks.activate(self, self.hr_extra_network_data)
        steps = self.hr_second_pass_steps or self.steps
        self.calculate_hr_conds()
        self.scripts.before_hr(self)
        self.scripts.process_before_every_sampling(self, x=samples, noise=noise, c=self.c, uc=self.uc)
        samples = self.sampler.sample_img2img(self, samples, noise, steps=steps)
        self.is_hr_pass = False
        return samples


class StableDiffusionProcessingImg2Img(StableDiffusionProcessing):
    def init(self, all_prompts, all_seeds, all_subseeds):
        self.init_latent = shared.sd_model.encode_first_stage(
            np.asarray(self.init_images[0].convert("RGB").resize((self.width, self.height)))
        )

    def sample(self, conditioning, unconditional_conditioning, seeds, subseeds, subseed_strength, prompts):
        self.sampler = sd_samplers_common.Sampler(sd_samplers_common.ALL[self.sampler_name])
        noise = self.rng(self.latent_shape())
        latent = self.init_latent.expand(len(noise), -1, -1, -1)
        self.scripts.process_before_every_sampling(
            self, x=latent, noise=noise, c=conditioning, uc=unconditional_conditioning
        )
        return self.sampler.sample_img2img(self, latent, noise)


class Processed:
    def __init__(self, p, images_list, infotexts):
        self.images, self.infotexts, self.index_of_first_image = images_list, infotexts, 0
        self.fields = {name: getattr(p, name) for name in SAVED}
        self.extra_generation_params = p.extra_generation_params
        self.comments = "".join(f"{comment}\n" for comment in p.comments)

    def js(self):
        own = ("extra_generation_params", "infotexts", "index_of_first_image")
        fields = {**self.fields, **{name: getattr(self, name) for name in own}}
        return json.dumps(fields, default=lambda _: None)


def learned(prompts, steps):
    """For each prompt its conditionings and their schedule: [(until step, conditioning), …, (None, …)]."""

    def text(prompt):
        return shared.sd_model.get_learned_conditioning(prompt)

    def schedule(prompt):
        edit = EDIT.search(prompt)
        if edit is None:
            return [(None, text(prompt))]
        where = float(edit[3])
        return [
            (int(where * steps if where < 1 else where), text(EDIT.sub(r"\1", prompt))),
            (None, text(EDIT.sub(r"\2", prompt))),
        ]

    return [schedule(prompt) for prompt in prompts]


def multicond(prompts, steps):
    return learned(prompts[0].split(" AND "), steps)


def create_infotext(p, index):
    written = {
        "Steps": p.steps, "Sampler": p.sampler_name, "CFG scale": p.cfg_scale, "Seed": p.all_seeds[index],
        "Size": f"{p.width}x{p.height}",
        "Model": Path(shared.sd_model.sd_checkpoint_info.filename).stem, **p.extra_generation_params,
        "Version": "stand-in",
    }  # fmt: skip
    negative = f"\nNegative prompt: {p.negative_prompt}" if p.negative_prompt else ""
    parameters = infotext_utils.write({name: value for name, value in written.items() if value is not None})
    return f"{p.all_prompts[index]}{negative}\n{parameters}"


def process_images(p):
    p.scripts.before_process(p)
    stored = {name: shared.opts.data[name] for name in p.override_settings if name in shared.opts.data}
    try:
        shared.opts.data.update(p.override_settings)
        sd_models.reload_model_weights()
        return process_images_inner(p)
    finally:
        if p.override_settings_restore_afterwards:
            shared.opts.data.update(stored)


@torch.no_grad()
def process_images_inner(p):
    state = shared.state
    if p.refiner_checkpoint:
        p.refiner_checkpoint_info = sd_models.get_closet_checkpoint_match(p.refiner_checkpoint)
        if p.refiner_checkpoint_info is None:
            raise RuntimeError(f"Could not find checkpoint with name {p.refiner_checkpoint}")
    if p.s_min_uncond is None:
        p.s_min_uncond = shared.opts.s_min_uncond
    p.seed = int(p.seed) if p.seed not in (None, -1) else 0
    p.all_prompts = [p.prompt] * (p.n_iter * p.batch_size)
    p.all_seeds = [p.seed + i for i in range(len(p.all_prompts))]
    p.all_subseeds = p.all_seeds
    p.scripts.process(p)
    p.init(p.all_prompts, p.all_seeds, p.all_subseeds)
    if state.job_count == -1:
        state.job_count = p.n_iter
    images, infotexts = [], []
    for iteration in range(p.n_iter):
        p.iteration = iteration
        state.skipped = False
        if state.interrupted or state.stopping_generation:
            break
        sd_models.reload_model_weights()
        part = slice(p.iteration * p.batch_size, (p.iteration + 1) * p.batch_size)
        p.prompts, p.seeds, p.subseeds = p.all_prompts[part], p.all_seeds[part], p.all_subseeds[part]
        p.negative_prompts = [p.negative_prompt] * len(p.prompts)
        of_batch = {
            "batch_number": p.iteration,
            "prompts": p.prompts,
            "seeds": p.seeds,
            "subseeds": p.subseeds,
        }
        p.scripts.before_process_batch(p, **of_batch)
        p.parse_extra_network_prompts()
        if not p.disable_extra_networks:
            extra_networks.activate(p, p.extra_network_data)
        p.scripts.process_batch(p, **of_batch)
        p.setup_conds()
        samples = p.sample(
            conditioning=p.c,
            unconditional_conditioning=p.uc,
            seeds=p.seeds,
            subseeds=p.subseeds,
            subseed_strength=0,
            prompts=p.prompts,
        )
        state.next_job()
        p.scripts.post_sample(p, samples)
        decoded = [shared.sd_model.decode_first_stage(sample.contiguous(), *p.size()) for sample in samples]
        p.scripts.postprocess_batch(p, images=decoded, batch_number=p.iteration)
        for i, array in enumerate(decoded):
            image, infotext = Image.fromarray(array), create_infotext(p, part.start + i)
            if shared.opts.samples_save and not p.do_not_save_samples:
                save_image(image, p.outpath_samples, p.seeds[i], infotext)
            images.append(image)
            infotexts.append(infotext)
    if not p.disable_extra_networks and images:
        extra_networks.deactivate(p, p.extra_network_data)
    processed = Processed(p, images, infotexts or [create_infotext(p, 0)])
    p.scripts.postprocess(p, processed)
    return processed
