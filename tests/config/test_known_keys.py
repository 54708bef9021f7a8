"""Every key of PaddleNLP is a setting, is refused, or has no effect; nothing else is known."""

from __future__ import annotations

from pathlib import Path

from pypkg.config.known_keys import NO_EFFECT, REFUSED
from pypkg.config.settings import setting_fields

FIXTURES = Path(__file__).resolve().parents[1] / "golden" / "paddlenlp_configs"


def test_every_paddlenlp_key_is_known_once():
    known = [spec.name for spec in setting_fields()]
    known += [row.name for row in (*NO_EFFECT, *REFUSED)]
    assert len(known) == len(set(known))
    ours = {
        "attention_backend", "eval_on_start",
        "ops_backend", "num_threads", "eval_iters", "sample_prompt", "sample_tokens",
        "sample_prompts", "sample_steps",
        "matmul_precision", "blend_by", "blend_temperature", "sample_order",
        "reset_attention_mask", "reset_position_ids", "eod_mask_loss",
        "download", "allow_unknown_config", "loss_normalization", "verify_checkpoint",
        "max_rollbacks", "rollback_window", "rollback_skip_steps",
        "loss_spike_threshold", "grad_norm_spike_threshold", "spike_window",
        "verify_data", "async_save_memory", "allow_local_output", "profiler_options",
        "lr_wsd_decay_steps", "lr_wsd_decay_style", "stochastic_rounding", "muon_momentum",
        "z_loss", "log_layer_grad_norms", "rampup_batch_size",
        "mup_base_width", "embedding_lr_scale", "head_lr_scale",
    }  # fmt: skip
    expected = set((FIXTURES / "keys.txt").read_text(encoding="utf-8").split())
    expected |= set((FIXTURES / "keys_auto.txt").read_text(encoding="utf-8").split())
    assert set(known) == expected | ours
