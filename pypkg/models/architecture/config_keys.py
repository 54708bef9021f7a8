"""Keys of config.json that have the same meaning in every family and do not describe the model.

``Family.read_config`` rejects a key that neither this file nor the family lists, because it may
change the model. Nothing here imports Paddle.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_GENERATION = (
    "bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping "
    "encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id "
    "forced_eos_token_id length_penalty max_length max_new_tokens min_length no_repeat_ngram_size "
    "num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states "
    "output_scores remove_invalid_values repetition_penalty return_dict return_dict_in_generate "
    "suppress_tokens temperature top_k top_p typical_p use_cache"
)
_TOKENS = (
    "boi_token_id cls_token_id decoder_start_token_id eol_token_id prefix sep_token_id "
    "tokenizer_class unk_token_id"
)
_HEADS_OF_OTHER_TASKS = (
    "classifier_dropout finetuning_task id2label ignore_index label2id num_choices num_labels "
    "problem_type task_specific_params tie_encoder_decoder is_decoder"
)
_PROGRAM = (
    "_attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash "
    "_flash_attn_2_enabled _from_model_config _name_or_path architectures attn_implementation "
    "auto_map chunk_size_feed_forward custom_pipelines dtype gradient_checkpointing model_type "
    "name_or_path paddlenlp_version tf_legacy_loss torch_dtype torchscript transformers.js_config "
    "transformers_version unsloth_fixed unsloth_version use_bfloat16"
)
# Keys with which PaddleNLP chooses parallelism, recompute, fused operators and generation.
_PADDLENLP = (
    "context_parallel_degree dpo_config fuse_attention_ffn fuse_attention_qkv "
    "fuse_sequence_parallel_allreduce immediate_clear_past_key_value kto_config "
    "long_sequence_init_args long_sequence_strategy_name long_sequence_strategy_type "
    "mp_degree no_recompute_layers num_partitions offload_recompute_inputs "
    "pipeline_parallel_degree pp_recompute_interval recompute recompute_granularity "
    "recompute_use_reentrant refined_recompute sep_parallel_degree sequence_parallel "
    "tensor_parallel_degree tensor_parallel_output tensor_parallel_rank use_dualpipev "
    "use_fast_layer_norm use_flash_attention use_flash_attention_for_generation "
    "use_fused_dropout_add use_fused_linear use_fused_linear_cross_entropy use_fused_rms_norm "
    "use_fused_rope use_last_token_for_generation virtual_pp_degree"
)
# Keys that do not affect training with any value.
UNUSED = frozenset(
    f"{_GENERATION} {_TOKENS} {_HEADS_OF_OTHER_TASKS} {_PROGRAM} {_PADDLENLP}".split()
)
# Keys that do not affect the model with these values or null; other values change the model.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "quantization_config": ({},),
    "use_long_sequence_strategies": (False,),
}
# Dropout probabilities, under the names of all families.
_DROPOUTS = (
    "activation_dropout attention_dropout attention_probs_dropout_prob attn_dropout_prob "
    "attn_pdrop dropout embd_pdrop emb_dropout_prob hidden_dropout hidden_dropout_prob layerdrop "
    "resid_pdrop"
)
DROPOUTS = frozenset(_DROPOUTS.split())
