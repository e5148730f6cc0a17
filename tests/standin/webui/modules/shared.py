"""Options, the state of the job under way, the folder, and the loaded checkpoint."""

from types import SimpleNamespace

from modules.options import Options

DEFAULTS = {
    "sd_model_checkpoint": None, "lora_functional": False, "lora_in_memory_limit": 0,
    "lora_add_hashes_to_infotext": True, "sd_lora": "None",
    "extra_networks_default_multiplier": 1.0, "hires_fix_refiner_pass": "second pass",
    "fp8_storage": "Disable",
    "cache_fp16_weight": False, "skip_early_cond": 0.0, "s_min_uncond": 0.0, "img2img_fix_steps": False,
    "CLIP_stop_at_last_layers": 1,
    "live_previews_enable": True, "persistent_cond_cache": True, "refiner_switch_by_sample_steps": False,
    "samples_save": False, "outdir_txt2img_samples": "outputs",
}  # fmt: skip


class State:
    def __init__(self):
        self.sampling_steps = 0
        self.begin()
        self.end()
        self.restart_requested = False

    def begin(self):
        self.interrupted = self.skipped = self.stopping_generation = False
        self.job, self.job_no, self.job_count = "a job", 0, -1
        self.sampling_step = self.current_image_sampling_step = 0
        self.textinfo = self.current_latent = None

    def end(self):
        self.job, self.job_count = "", 0

    def next_job(self):
        self.job_no += 1
        self.sampling_step = self.current_image_sampling_step = 0

    def interrupt(self):
        self.interrupted = True

    def skip(self):
        self.skipped = True

    def request_restart(self):
        self.interrupt()
        self.restart_requested = True


opts = Options(DEFAULTS)
cmd_opts = SimpleNamespace(api_auth=None, folder=None)
state = State()
sd_model = None
