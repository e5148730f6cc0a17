"""Samplers with the number of evaluations, and the counters beside them, that were measured on the host."""

from collections import namedtuple

import torch

from modules import script_callbacks, sd_models, shared


class InterruptedException(BaseException):
    pass


class SamplerData(namedtuple("SamplerData", "name aliases options")):
    def total_steps(self, steps):
        return steps * 2 if self.options.get("second_order") else steps


def _second_order(name):
    return SamplerData(name, [], {"second_order": True})


ALL = {
    data.name: data for data in (
        *(SamplerData(name, [], {}) for name in ("Euler a", "Euler", "DPM++ 2M", "DPM++ 2M SDE", "LMS",
        "DPM adaptive")),
        *map(_second_order, ("Heun", "DPM++ SDE", "DPM2", "DPM2 a", "DPM++ 2S a", "Restart")),
        *(SamplerData(name, [], {"timesteps": True}) for name in ("DDIM", "PLMS", "UniPC")),
    )
}  # fmt: skip
ADAPTIVE_CALLS = 3
"""Evaluations of DPM adaptive for each step asked for: it takes as many as it likes."""


def setup_img2img_steps(p, steps=None):
    """(steps of the whole schedule, index of the last step that runs)."""
    strength = min(p.denoising_strength, 0.999)
    if steps is None and not shared.opts.img2img_fix_steps:
        return p.steps, int(strength * p.steps)
    run = steps or p.steps
    return (int(run / strength) if strength > 0 else 0), run - 1


def apply_refiner(denoiser, timestep):
    p = denoiser.p
    info = p.refiner_checkpoint_info
    done = (
        denoiser.step / denoiser.total_steps
        if shared.opts.refiner_switch_by_sample_steps
        else (999 - timestep) / 1000
    )
    if info is None or done < p.refiner_switch_at or shared.sd_model.sd_checkpoint_info is info:
        return
    only = shared.opts.hires_fix_refiner_pass
    if p.enable_hr and only != "both" and only != ("second pass" if p.is_hr_pass else "first pass"):
        return
    p.extra_generation_params.update({"Refiner": info.short_title, "Refiner switch at": p.refiner_switch_at})
    sd_models.reload_model_weights(info)
    p.setup_conds()


def at(schedule, step):
    """The text conditioning that holds at a step, of [(until step, conditioning), …]."""
    return next(cond for until, cond in schedule if until is None or step < until)


class CFGDenoiser:
    """One evaluation: callbacks, the denoiser on all prompts and their negative one, the guidance."""

    def __init__(self, sampler, p):
        self.sampler, self.p = sampler, p
        self.step = self.steps = self.total_steps = 0

    def __call__(self, x, sigma, timestep):
        state, p = shared.state, self.p
        if state.interrupted or state.skipped:
            raise InterruptedException
        apply_refiner(self, timestep)
        conds, uncond = [at(schedule, self.step) for schedule in p.c], at(p.uc, self.step)
        level = torch.full(
            [len(x) * (len(conds) + 1)],
            float(timestep) if self.sampler.config.options.get("timesteps") else sigma,
        )
        params = script_callbacks.CFGDenoiserParams(
            x.repeat(len(conds) + 1, 1, 1, 1),
            level,
            state.sampling_step,
            state.sampling_steps,
            conds,
            uncond,
            self,
        )
        script_callbacks.call("cfg_denoiser", params)
        early = shared.opts.skip_early_cond and self.step / self.total_steps <= shared.opts.skip_early_cond
        skip_uncond = early or (self.step % 2 and sigma < p.s_min_uncond)
        texts = conds if skip_uncond else [*conds, uncond]
        if len({len(text) for text in texts}) == 1:
            context = torch.cat([text.expand(len(x), -1, -1) for text in texts])
            outs = shared.sd_model.apply_model(
                x.repeat(len(texts), 1, 1, 1), torch.full([len(context)], timestep), context
            ).chunk(len(texts))
        else:
            outs = [
                shared.sd_model.apply_model(x, torch.full([len(x)], timestep), text.expand(len(x), -1, -1))
                for text in texts
            ]
        script_callbacks.call(
            "cfg_denoised",
            script_callbacks.CFGDenoisedParams(
                torch.cat(list(outs)), state.sampling_step, state.sampling_steps
            ),
        )
        base = outs[0] if skip_uncond else outs[-1]
        scale = 1 if skip_uncond else p.cfg_scale
        denoised = base + sum(out - base for out in outs[: len(conds)]) * scale
        script_callbacks.call(
            "cfg_after_cfg",
            script_callbacks.AfterCFGCallbackParams(denoised, state.sampling_step, state.sampling_steps),
        )
        self.sampler.last_latent = denoised
        self.step += 1
        return denoised


class Sampler:
    def __init__(self, config):
        self.config = config
        self.last_latent = None

    def timesteps(self, steps):
        return torch.linspace(999, 0, steps).round().int()

    def get_sigmas(self, p, steps):
        return torch.cat([sd_models.SIGMAS[self.timesteps(steps)], torch.zeros(1)])

    def run(self, p, x, steps, first):
        """Denoise from step `first` of a schedule of `steps`."""
        state, name = shared.state, self.config.name
        self.model_wrap_cfg = denoiser = CFGDenoiser(self, p)
        denoiser.steps = run = steps - first
        denoiser.total_steps = self.config.total_steps(run)
        state.sampling_steps, state.sampling_step = run, 0
        self.last_latent = x
        sigmas, timesteps = self.get_sigmas(p, steps)[first:], self.timesteps(steps)[first:]
        lag = 1 if name in ("PLMS", "UniPC") else 0
        try:
            for i in range(run - (name == "DDIM" and run > 1)):
                sigma, following = float(sigmas[i]), float(sigmas[i + 1])
                denoised = denoiser(x, sigma, int(timesteps[i]))
                state.sampling_step = max(i - lag, 0)
                if following and (self.config.options.get("second_order") or name == "DPM adaptive"):
                    for _ in range(ADAPTIVE_CALLS - 1 if name == "DPM adaptive" else 1):
                        middle = (sigma * following) ** 0.5
                        denoised = denoiser(
                            denoised + (x - denoised) * (middle / sigma), middle, int(timesteps[i + 1])
                        )
                x = denoised + (x - denoised) * (following / sigma)
                if name.endswith((" a", "SDE")) and following:
                    x = x + p.rng() * following * 0.3
        except InterruptedException:
            return self.last_latent
        return x

    def sample(self, p, x):
        return self.run(p, x * self.get_sigmas(p, p.steps)[0], p.steps, 0)

    def sample_img2img(self, p, x, noise, steps=None):
        whole, last = setup_img2img_steps(p, steps)
        whole = max(whole, last + 1)
        first = whole - last - 1
        return self.run(p, x + noise * self.get_sigmas(p, whole)[first], whole, first)
