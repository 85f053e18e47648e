"""Names of transformers' Q-Former, or parts of them between dots, and ours; longer ones first."""

QFORMER_NAMES = {
    "layernorm": "norm",
    "encoder.layer": "blocks",
    "crossattention.output.LayerNorm": "picture_norm",
    "attention.output.LayerNorm": "attention_norm",
    "output_query.LayerNorm": "feed_forward_norm",
    "intermediate_query.dense": "feed_forward.fc1",
    "output_query.dense": "feed_forward.fc2",
    "attention.attention": "attention",
    "crossattention.attention": "picture_attention",
    "attention.output.dense": "attention.out_proj",
    "crossattention.output.dense": "picture_attention.out_proj",
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
}
