"""Building, indexing, planning and streaming webdataset shards.

Knows ``mmcot.texts.problem`` and nothing else of ours: features, prompts and tokenizers come
in as plain functions.
"""
