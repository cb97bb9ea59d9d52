"""What is not served, said with its reason before a model is loaded."""

from typing import Any


def refusal(what: str, instead: str = "") -> ValueError:
    """The error for something that this backend does not serve."""
    advice = instead or "leave out --attention-backend CUSTOM"
    return ValueError(f"vattn does not serve {what}: {advice}")


def refuse_layer(
    *,
    num_heads: int,
    num_kv_heads: int,
    alibi_slopes: Any,
    sliding_window: int | None,
    kv_cache_dtype: str,
    logits_soft_cap: float | None,
    attn_type: str,
    kv_sharing_target_layer_name: str | None,
    extra: dict[str, Any],
) -> None:
    """Refuses an attention layer by what vLLM makes it with."""
    if attn_type != "decoder":
        raise refusal(f"attention of type {attn_type}, only that of decoders")
    if sliding_window is not None:
        raise refusal(
            f"layers with a sliding window (of {sliding_window} tokens)",
            "give these layers vLLM's own backend: in place of --attention-backend CUSTOM use "
            '--attention-config \'{"backend_per_kind": {"full_attention": "CUSTOM"}}\'',
        )
    if logits_soft_cap:
        raise refusal(f"layers whose logits are capped (softcap {logits_soft_cap:g})")
    if alibi_slopes is not None:
        raise refusal("ALiBi")
    if kv_sharing_target_layer_name is not None:
        raise refusal(f"layers that share the KV of others (of {kv_sharing_target_layer_name})")
    if kv_cache_dtype not in ("auto", "float16", "bfloat16", "float32"):
        raise refusal(
            f"rows of {kv_cache_dtype}", "leave out --kv-cache-dtype: rows have the model's type"
        )
    for name, value in extra.items():
        if name == "sinks" and value is not None:
            raise refusal("attention sinks")
        if value is not None and (not isinstance(value, int) or value not in (0, -1)):
            raise refusal(f"attention with {name}")
    if num_heads % num_kv_heads:
        raise refusal(f"{num_heads} query heads over {num_kv_heads} KV heads")


def refuse_config(config: Any, dense: bool) -> None:
    """Refuses a VllmConfig; dense: policy dense was asked for."""
    parallel, model = config.parallel_config, config.model_config
    heads = model.get_total_num_kv_heads()
    if heads % parallel.tensor_parallel_size and not dense:
        # Some ranks would have the same KV head with others of its query heads.
        raise refusal(
            f"{heads} KV heads over {parallel.tensor_parallel_size} ranks, except with policy dense",
            f"give --tensor-parallel-size a divisor of {heads}",
        )
    if parallel.pipeline_parallel_size > 1 and not dense:
        raise refusal(
            f"pipeline parallelism (of {parallel.pipeline_parallel_size}) except with policy dense",
            "leave out --pipeline-parallel-size",
        )
    if parallel.decode_context_parallel_size > 1:
        raise refusal(
            f"decode context parallelism (of {parallel.decode_context_parallel_size})",
            "leave out --decode-context-parallel-size",
        )
    if parallel.prefill_context_parallel_size > 1:
        raise refusal("prefill context parallelism", "leave out --prefill-context-parallel-size")
    if parallel.enable_dbo:
        raise refusal("dual batch overlap", "leave out --enable-dbo")
    if config.kv_transfer_config is not None:
        raise refusal(
            "KV connectors, which move pages whose contents are vattn's",
            "leave out --kv-transfer-config",
        )
    if model.is_hybrid:
        raise refusal("hybrid models, whose blocks vLLM copies by itself")
    if model.is_mm_prefix_lm:
        raise refusal("models that attend to images in both directions")
    if config.attention_config.use_non_causal:
        raise refusal("attention in both directions")
    speculative = config.speculative_config
    if speculative is not None and speculative.draft_model_config is not None:
        if speculative.method not in ("ngram", "ngram_gpu", "suffix"):
            raise refusal(
                f"drafts by a model (method {speculative.method})",
                "speculate by ngram or suffix",
            )
